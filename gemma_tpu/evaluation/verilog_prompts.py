"""How verilog-eval's problems are put to a model: named styles, and named settings of sampling.

The sentences of the official style are those of verilog-eval (MIT licence, NVIDIA Research Projects); the examples
for 1 to 4 shots are read from the clone.
"""

from collections.abc import Sequence
from pathlib import Path

from gemma_tpu import plain
from gemma_tpu.errors import UserError
from gemma_tpu.evaluation.answering import Draw, Question
from gemma_tpu.evaluation.verilog_eval import FETCH, TASKS, TOP, EvalProblem

STYLES = ("official", "paper")
SHOTS = range(5)
SETTINGS = {
    "official-low": Draw(n=1, temperature=0.0, top_p=0.01),
    "official-high": Draw(n=20, temperature=0.85, top_p=0.95),
    "paper": Draw(n=5, temperature=0.8, top_p=0.95),
}
PLACE = "{prompt}"  # where a prompt file of the user's wants the problem

_SYSTEM = {
    TASKS[0]: "\nYou are a Verilog RTL designer that only writes code using correct Verilog syntax.\n",
    TASKS[1]: "\nYou only complete chats with syntax correct Verilog code. End the Verilog module code completion with "
              "'endmodule'. Do not include module, input and output definitions.\n",
}  # fmt: skip
_MARKERS = (
    "\nEnclose your code with [BEGIN] and [DONE]. Only output the code snippet\n"
    "and do NOT output anything else.\n"
)
_COMPLETE = (
    "\n// Implement the Verilog module based on the following description. Assume that signals are positive "
    "clock/clk triggered unless otherwise stated.\n"
)
# The paper's prompt in words of our own (its licence keeps its sentences to itself): one user turn, the module's name,
# the fence, and its three hints, which were written after looking at failures on these very problems.
_PAPER = (
    f"\n\nCall the module `{TOP}` and take the names of its ports exactly as they stand above. Whatever an always "
    "block assigns must be declared `reg` and not `wire`. Assign the elements of an array one by one, never the array "
    "at once. Answer with nothing but the code, in one ```verilog fence."
)
NOTES = {
    "paper": "the paper's prompt in our own words; its hints were written after looking at failures on these problems",
}


def questions(
    problems: Sequence[EvalProblem], style: str = "official", shots: int = 0, clone: str | Path | None = None
) -> list[Question]:
    """One question a problem. `style` is one of STYLES, or a file that holds {prompt} once or more."""
    if style == "official":
        before = examples(clone, problems[0].task, shots) if shots else ""
        return [Question(one.id, official(one, before)) for one in problems]
    if shots:
        raise UserError(f"--shots {shots} belongs to the official prompt, not to {style}")
    form = PLACE + _PAPER if style == "paper" else _form(Path(style))
    return [
        Question(one.id, [{"role": "user", "content": form.replace(PLACE, one.prompt.strip())}]) for one in problems
    ]


def official(problem: EvalProblem, before: str = "") -> list[dict[str, str]]:
    """The turns that the official scripts send, `before` being the text of the examples."""
    if problem.task == TASKS[0]:
        text = f"{before}\nQuestion:\n{problem.prompt.strip()}\n{_MARKERS}\nAnswer:\n"
    else:
        lines, inside = [], False
        for line in problem.prompt.splitlines():
            if f"module {TOP}" in line:
                lines.append("")
                inside = True
            lines.append(line if inside else f"// {line}")
        text = before + _COMPLETE + "\n".join(lines)
    return [{"role": "system", "content": _SYSTEM[problem.task]}, {"role": "user", "content": text}]


def examples(clone: str | Path | None, task: str, shots: int) -> str:
    """The worked examples that stand before the question, as the clone has them."""
    if shots not in SHOTS:
        raise UserError(f"--shots {shots}: the official prompt has 0 to {SHOTS[-1]} examples")
    name = f"verilog-example-prefix_{task}_{shots}-shot.txt"
    places = [Path(clone or ".") / "scripts" / name, Path(clone or ".") / name]
    for path in places:
        if path.is_file():
            return plain.text(path)
    raise UserError(f"--shots {shots} needs {places[0]}, which is missing; fetch the whole benchmark by: {FETCH}")


def _form(path: Path) -> str:
    try:
        form = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--style {path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        known = " nor ".join(STYLES)
        raise UserError(f"--style {path}: neither {known}, and cannot be read: {error.strerror}") from None
    if PLACE not in form:
        raise UserError(f"--style {path}: holds no {PLACE}, the place of the problem's text")
    return form
