"""What the tests of chat templates share: conversations of every kind, templates of this project's own, and published
ones where they are installed, plain and with `{% generation %}` around what the model says.
"""

import importlib.util
import os
import random
import re
from pathlib import Path
from typing import Any

Messages = list[dict[str, Any]]
THOUGHT = "<|channel>thought\n<channel|>"
OPEN, CLOSE = "{%- generation -%}", "{%- endgeneration -%}"
WORDS = "module wire assign the output of a counter grows slowly größe naïve ☃ 数字 8'hff y=a&b; (q) [7:0] 3.5".split()
# Texts that look like turns: no reader of markup may take them for some.
TRAPS = ["user\nmodel\n", "a<turn|>\n<|turn>model\nb", "<|tool_response>response:f{}<tool_response|>", "<|tool_call>x",
         "<start_of_turn>model\nc<end_of_turn>", "q[[text0]] [[text"]  # fmt: skip
TOOLS = [{"type": "function", "function": {
    "name": "run", "description": "Runs a test.", "parameters": {
        "type": "object", "properties": {"file": {"type": "string", "description": "its name"}}, "required": ["file"],
    }}}]  # fmt: skip


# --- conversations ------------------------------------------------------------------------------------------------


class Speaker:
    """Random conversations; `traps`: texts of users and tools may quote the markup itself."""

    def __init__(self, seed: int, traps: bool = True):
        self.random, self.traps = random.Random(seed), traps

    def text(self, quotes: bool = False) -> str:
        pieces = [self.random.choice(WORDS) for _ in range(self.random.randint(1, 9))]
        if quotes and self.traps and self.random.random() < 0.3:
            pieces.insert(self.random.randint(0, len(pieces)), self.random.choice(TRAPS))
        # Where marked text ends in a character of several tokens, transformers' mask has only the first of them.
        return f"so {' '.join(pieces)} it{self.random.choice(['', chr(10), '  ', '.'])}"

    def conversation(self, *, tools: bool, reasoning: bool, system: bool | None = None) -> Messages:
        system = self.random.random() < 0.5 if system is None else system
        messages = [{"role": "system", "content": self.text()}] if system else []
        for _ in range(self.random.randint(1, 4)):
            messages.append({"role": "user", "content": self.text(quotes=True)})
            for _ in range(self.random.choice([0, 1, 1, 2]) if tools else 0):
                messages += self.calls(reasoning)
            messages.append(self.answer(reasoning))
        if self.random.random() < 0.2:
            messages.append({"role": "user", "content": self.text(quotes=True)})
        return messages

    def answer(self, reasoning: bool) -> dict[str, Any]:
        thought = {self.random.choice(["reasoning", "reasoning_content"]): self.text().strip()} if reasoning else {}
        return {"role": "assistant", "content": self.text(), **thought}

    def calls(self, reasoning: bool) -> Messages:
        """An assistant message that calls one or two tools, and what they respond."""
        names = [self.random.choice(["run", "read"]) for _ in range(self.random.randint(1, 2))]
        calls = [{"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": {
            "file": self.text(quotes=True), "count": n, "flags": [True, "x y"]}}} for n, name in enumerate(names)]
        message: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": calls}
        if reasoning:
            message["reasoning"] = self.text().strip()
        elif self.random.random() < 0.2:
            message["content"] = self.text()
        results = [{"role": "tool", "tool_call_id": f"call_{n}", "name": name, "content": self.text(quotes=True)}
                   for n, name in enumerate(names)]
        return [message, *results]  # fmt: skip


# --- templates of this project -----------------------------------------------------------------------------------


def own(*, marked: bool = False, thought: bool = False, keeps: bool = True) -> str:
    """Turns as Gemma 4 has them: system, tools, thinking, what tools respond inside the model's turn.

    `thought`: the generation prompt has an empty thought where thinking is off. `keeps`: reasoning is rendered in every
    turn, else only after the last user turn.
    """
    g, e = (OPEN, CLOSE) if marked else ("", "")
    empty = "{%- if not enable_thinking -%}{{ '<|channel>thought\\n<channel|>' }}{%- endif -%}" if thought else ""
    late = "true" if keeps else "loop.index0 > seen.user"
    return f"""\
{{%- macro value(x) -%}}
{{%- if x is string -%}}{{{{ '<|"|>' ~ x ~ '<|"|>' }}}}
{{%- elif x is boolean -%}}{{{{ 'true' if x else 'false' }}}}
{{%- elif x is mapping -%}}
    {{{{ '{{' }}}}{{%- for k, v in x | dictsort -%}}{{{{ k ~ ':' ~ value(v) ~ ('' if loop.last else ',') }}}}{{%- endfor -%}}{{{{ '}}' }}}}
{{%- elif x is sequence -%}}
    {{{{ '[' }}}}{{%- for v in x -%}}{{{{ value(v) ~ ('' if loop.last else ',') }}}}{{%- endfor -%}}{{{{ ']' }}}}
{{%- else -%}}{{{{ x }}}}{{%- endif -%}}
{{%- endmacro -%}}
{{{{- bos_token -}}}}
{{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}}
{{%- if tools or enable_thinking or messages[0].role == 'system' -%}}
    {{{{ '<|turn>system\\n' ~ ('<|think|>\\n' if enable_thinking else '') }}}}
    {{%- if messages[0].role == 'system' -%}}{{{{ messages[0].content | trim }}}}{{%- endif -%}}
    {{%- for tool in tools or [] -%}}{{{{ '<|tool>declaration:' ~ tool.function.name ~ value(tool.function.parameters) ~ '<tool|>' }}}}{{%- endfor -%}}
    {{{{ '<turn|>\\n' }}}}
{{%- endif -%}}
{{%- set seen = namespace(user=-1, role='', called=false) -%}}
{{%- for m in rest -%}}{{%- if m.role == 'user' -%}}{{%- set seen.user = loop.index0 -%}}{{%- endif -%}}{{%- endfor -%}}
{{%- for m in rest -%}}
    {{%- if m.role == 'tool' -%}}
        {{{{ '<|tool_response>response:' ~ m.name ~ value({{'value': m.content}}) ~ '<tool_response|>' }}}}
    {{%- elif m.role == 'assistant' -%}}
        {{%- if seen.role != 'tool' -%}}{{{{ '<|turn>model\\n' }}}}{{%- endif -%}}
        {{%- set said = m.reasoning or m.reasoning_content -%}}
        {g}
        {{%- if said and {late} -%}}{{{{ '<|channel>thought\\n' ~ said ~ '\\n<channel|>' }}}}{{%- endif -%}}
        {{%- if m.content -%}}{{{{ m.content | trim }}}}{{%- endif -%}}
        {{%- for call in m.tool_calls or [] -%}}{{{{ '<|tool_call>call:' ~ call.function.name ~ value(call.function.arguments) ~ '<tool_call|>' }}}}{{%- endfor -%}}
        {{%- if not m.tool_calls -%}}{{{{ '<turn|>' }}}}{{%- endif -%}}
        {e}
        {{%- if not m.tool_calls -%}}{{{{ '\\n' }}}}{{%- endif -%}}
    {{%- else -%}}
        {{{{ '<|turn>' ~ m.role ~ '\\n' ~ m.content | trim ~ '<turn|>\\n' }}}}
    {{%- endif -%}}
    {{%- set seen.role = m.role -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt and seen.role != 'tool' -%}}{{{{ '<|turn>model\\n' }}}}{empty}{{%- endif -%}}
"""  # noqa: E501


def own_tool_turns(*, marked: bool = False) -> str:
    """What tools respond in turns of their own, and a system text inside the first user turn, as Gemma 3 has it."""
    g, e = (OPEN, CLOSE) if marked else ("", "")
    return f"""\
{{{{- bos_token -}}}}
{{%- for tool in tools or [] -%}}{{{{ '<|tool>' ~ tool.function.name ~ '<tool|>' }}}}{{%- endfor -%}}
{{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}}
{{%- for m in rest -%}}
    {{%- if m.role == 'assistant' -%}}
        {{{{ '<|turn>model\\n' }}}}{g}
        {{%- if m.content -%}}{{{{ m.content | trim }}}}{{%- endif -%}}
        {{%- for call in m.tool_calls or [] -%}}{{{{ '<|tool_call>' ~ call.function.name }}}}{{%- for k, v in call.function.arguments | dictsort -%}}{{{{ ' ' ~ k ~ '=' ~ v }}}}{{%- endfor -%}}{{{{ '<tool_call|>' }}}}{{%- endfor -%}}
        {{{{ '<turn|>' }}}}{e}{{{{ '\\n' }}}}
    {{%- else -%}}
        {{{{ '<|turn>' ~ m.role ~ '\\n' }}}}
        {{%- if loop.first and messages[0].role == 'system' -%}}{{{{ messages[0].content ~ '\\n\\n' }}}}{{%- endif -%}}
        {{{{ m.content | trim ~ '<turn|>\\n' }}}}
    {{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{ '<|turn>model\\n' }}}}{{%- endif -%}}
"""  # noqa: E501


# --- published templates ------------------------------------------------------------------------------------------

REVISIONS = ("gemma4_v2", "gemma4_v3", "gemma4", "gemma4_v4", "gemma4_v5")  # oldest first


def published(name: str) -> str | None:
    """A template as TRL ships it: from an installed TRL, or the folder that GEMMA_CHAT_TEMPLATES names."""
    folders = [Path(os.environ["GEMMA_CHAT_TEMPLATES"])] if "GEMMA_CHAT_TEMPLATES" in os.environ else []
    spec = importlib.util.find_spec("trl")
    if spec is not None and spec.origin:
        folders.append(Path(spec.origin).parent / "chat_templates")
    found = next((folder / f"{name}.jinja" for folder in folders if (folder / f"{name}.jinja").is_file()), None)
    return found.read_text() if found else None


def change(text: str, old: str, new: str, count: int = 1) -> str:
    assert text.count(old) == count, f"{old!r} is there {text.count(old)} times"
    return text.replace(old, new)


def large(text: str) -> str:
    """As 12B, 26B and 31B have it: with thinking off the generation prompt ends in an empty thought."""
    head, prompt = text.rsplit("{%- if add_generation_prompt -%}", 1)
    header = "{{- '<|turn>model\\n' -}}"
    thought = "{%- if not enable_thinking | default(false) -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}"
    return head + "{%- if add_generation_prompt -%}" + change(prompt, header, header + thought)


def marked(text: str, name: str) -> str:
    """`{% generation %}` around what the model says: reasoning, calls, content and the end of its turn."""
    return _marked3(text) if name == "gemma3" else _marked4(text, name)


def _marked3(text: str) -> str:
    content, end = "{{ message['content'] | trim }}", "{{ '<end_of_turn>\n' }}"
    text = change(text, content, _if_model(content, content))
    return change(text, end, _if_model("{{ '<end_of_turn>' }}", end, "{{ '\n' }}"))


def _marked4(text: str, name: str) -> str:
    thought = "{{- '<|channel>thought\\n' + thinking_text + '\\n<channel|>' -}}"
    if name == "gemma4_v5":  # after a tool's response its prompt opens the thought by itself
        reset = "{%- set ns.prev_message_type = None -%}"
        text = change(text, reset, "{%- set resumed = ns.prev_message_type == 'tool_response' -%}" + reset)
        text = change(text, thought, "{%- if resumed and enable_thinking -%}{{- '<|channel>thought\\n' -}}"
                      f"{OPEN}{{{{- thinking_text + '\\n<channel|>' -}}}}{CLOSE}{{%- else -%}}{OPEN}{thought}{CLOSE}"
                      "{%- endif -%}")  # fmt: skip
    elif name != "gemma4_v2":
        text = change(text, thought, OPEN + thought + CLOSE)
    call, called = "{{- '<|tool_call>call:' + function['name'] + '{' -}}", "{{- '}<tool_call|>' -}}"
    text = change(change(text, call, OPEN + call), called, called + CLOSE)
    captured, plain = "{{- captured_content -}}", "{{- strip_thinking(message['content']) -}}"
    if captured in text:
        text = change(text, captured, _if_model(captured, captured))
    else:
        text = change(text, plain, OPEN + plain + CLOSE)
    end = "{{- '<turn|>\\n' -}}"
    head, loop = text.split("{%- for message in loop_messages -%}", 1)
    loop = change(loop, end, _if_model("{{- '<turn|>' -}}", end, "{{- '\\n' -}}"))
    return head + "{%- for message in loop_messages -%}" + loop


def _if_model(said: str, otherwise: str, behind: str = "") -> str:
    return f"{{%- if role == 'model' -%}}{OPEN}{said}{CLOSE}{behind}{{%- else -%}}{otherwise}{{%- endif -%}}"


# --- what the model says, by the messages' own text ------------------------------------------------------------------


def value(x: Any) -> str:
    """An argument as Gemma 4 writes it."""
    if isinstance(x, str):
        return f'<|"|>{x}<|"|>'
    if isinstance(x, bool):
        return "true" if x else "false"
    if isinstance(x, dict):
        return "{" + ",".join(f"{k}:{value(v)}" for k, v in sorted(x.items())) + "}"
    return "[" + ",".join(map(value, x)) + "]" if isinstance(x, list) else str(x)


def called(message: dict[str, Any]) -> str:
    functions = [call["function"] for call in message.get("tool_calls") or []]
    return "".join(f"<|tool_call>call:{f['name']}{value(f['arguments'])}<tool_call|>" for f in functions)


def thought(message: dict[str, Any]) -> str:
    said = message.get("reasoning") or message.get("reasoning_content")
    return f"<|channel>thought\n{said}\n<channel|>" if said else ""


def without_inserted(ids: list[int], mask: list[bool], inserted: list[int]) -> tuple[list[int], list[bool]]:
    """The row without what only the generation prompt has."""
    kept_ids, kept_mask, at = [], [], 0
    while at < len(ids):
        end = at + len(inserted)
        if inserted and ids[at:end] == inserted and not any(mask[at:end]):
            at = end
            continue
        kept_ids.append(ids[at])
        kept_mask.append(mask[at])
        at += 1
    return kept_ids, kept_mask


def trained_runs(ids: list[int], mask: list[bool]) -> list[list[int]]:
    """The stretches of targets."""
    text = "".join("x" if target else "-" for target in mask)
    return [ids[found.start() : found.end()] for found in re.finditer("x+", text)]
