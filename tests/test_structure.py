"""The shape of the project: imports go one way, files stay small, the README's tree and the dependencies are true."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gemma_tpu"


def listed(text: str) -> list[str]:
    """`package: one two`, a line or more each, into `package.one`, `package.two`."""
    names, package = [], ""
    for line in text.splitlines():
        if line[:5].strip():  # no continuation line
            package = ""
        for word in line.split():
            if word.endswith(":"):
                package = word[:-1] + "."
            else:
                names.append(package + word)
    return names


# A module imports only from those above it, and from those to its left.
ORDER = listed("""
    errors assets plain schema config overlay
    hardware: gpus chips clouds prices devices distributed torus
    storage: ahead retry remote hub sources transfer header shards staging stage layout destination hub_cache
    gemma: variants hf_config mesh weights quantise streaming sizes remat per_device splash flash attention ragged
        projection experts kv_cache model sites loading
    run: runs metrics checkpoint
    pages: columns page report comparison comparison_page
    adapter: lowrank updates peft_folder lora start adapters tunix
    data: template tokenizer datafiles records turns formats transforms rows encoding workers tokens packing
        selection corpus batches pairs display data_text data_page
    compiled: hlo trips flops traffic links work timeline walk buffers
    step: loss optim job step preference
    estimate: budget roofline serving_memory inference advice
    sampling: drawing row_drawing decoding sampler asking completions endpoint chat
    training: flags program compiling tracing faults oom meter trackers logbook previews train mirrored
    handoff: blas patch difference card merging layerwise clients verify
    planning: subject calibration workload compilation plan plan_text sweep plan_page rehearsal
    evaluation: sandbox verilog_code verilog verilog_eval stats samples answering verilog_prompts own_prompts
        scorecard contamination scoring evaluate eval_page
    lite: fields requests programs batch answers metrics engine patience app
    serving: vllm_command
    launch: launching manifests launch_script scripts
    bench: arrivals points latencies wire bench_prompts exchange under_load scrape saturation doubts vllm_result
        bench_file measuring bench_text bench_page
    costs: cost paper cost_sources costing cost_text cost_page demand choose
    tiny: tokenizer towers archs config weights checkpoint
    onboarding: validate catalogue json_schema new_config doctor completion
    commands: arguments sample_cli plan_cli lite_cli eval_cli data_cli train_cli launch_cli serve_cli
        handoff_cli bench_cli find_cli cost_cli choose_cli
    cli
""")

# What `--help`, a wrong path and the data tools load: seconds would pass before the first word with JAX in it.
WITHOUT_JAX = listed("""
    errors assets plain schema config overlay
    hardware: gpus chips clouds prices devices distributed torus
    storage: ahead retry remote hub sources transfer header shards staging stage layout destination hub_cache
    gemma: variants hf_config weights quantise sizes
    run: runs metrics
    pages: columns comparison comparison_page page report
    adapter: lowrank updates peft_folder tunix
    data: template tokenizer datafiles records turns formats transforms rows encoding workers tokens packing
        selection corpus batches pairs display data_text data_page
    compiled: hlo trips flops traffic links work timeline walk buffers
    step: job
    estimate: budget roofline serving_memory inference advice
    sampling: asking endpoint chat
    training: flags compiling faults trackers mirrored
    handoff: blas patch difference card
    planning: subject calibration workload compilation
    evaluation: sandbox verilog_code verilog verilog_eval stats samples answering verilog_prompts own_prompts
        scorecard contamination scoring eval_page
    lite: fields requests
    serving: vllm_command
    launch: launching manifests launch_script scripts
    bench: arrivals points latencies wire bench_prompts exchange under_load scrape saturation doubts vllm_result
        bench_file measuring bench_text bench_page
    costs: cost paper demand
    tiny: tokenizer towers archs config weights checkpoint
    onboarding: catalogue json_schema doctor completion
    commands: sample_cli lite_cli arguments eval_cli plan_cli cost_cli choose_cli data_cli train_cli launch_cli
        serve_cli handoff_cli bench_cli find_cli
    cli
""")

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "transformers", "torch", "matplotlib"}
DISTRIBUTIONS = {"yaml": "pyyaml", "orbax": "orbax-checkpoint"}  # where the import has another name
OPTIONAL = {"torch", "peft", "pyarrow", "datasets"}  # verify asks the first two where they are; extras
OPTIONAL |= {"starlette", "uvicorn", "anyio", "prometheus_client"}  # the extra `serve`


@cache
def modules() -> dict[str, ast.Module]:
    """By dotted name inside the package."""
    paths = [path for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__")]
    paths = [path for path in paths if "bundled" not in path.parts]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text()) for path in paths}


def imports(tree: ast.AST, inside_functions: bool) -> Iterator[str]:
    """Dotted names that a module imports; `from gemma_tpu.gemma import mesh` is gemma_tpu.gemma.mesh."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module.startswith("gemma_tpu"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node, inside_functions)


def own(names: Iterator[str]) -> set[str]:
    return {name.removeprefix("gemma_tpu.") for name in names} & set(ORDER)


def test_every_module_has_its_place_in_the_order():
    assert sorted(ORDER) == sorted(modules())


def test_no_module_takes_the_place_of_a_public_function():
    import gemma_tpu

    assert not set(gemma_tpu.__all__) & set(modules())


def test_imports_go_one_way():
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        for other in own(imports(tree, inside_functions=True))
        if ORDER.index(other) >= ORDER.index(name)
    ]
    assert not wrong


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_importing_it_imports_nothing_heavy(name):
    trees, seen, queue = modules(), set(), [name]
    while queue:
        here = queue.pop()
        seen.add(here)
        found = list(imports(trees[here], inside_functions=False))
        heavy = {word.split(".")[0] for word in found} & HEAVY
        assert not heavy, f"{here}, which {name} imports, imports {heavy} at module level"
        queue += own(iter(found)) - seen


def test_every_package_says_what_it_is():
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    assert all(ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) for folder in folders)


def test_files_stay_small():
    limits = [(path, 400) for path in PACKAGE.rglob("*.py")] + [(path, 120) for path in ROOT.glob("recipes/*.py")]
    lengths = {str(path): (len(path.read_text().splitlines()), limit) for path, limit in limits}
    assert not {name: found for name, found in lengths.items() if found[0] > found[1]}


def test_the_readmes_tree_is_the_real_one():
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"^## The tree\n.*?```\n(.*?)```", readme, re.S | re.M)[1]
    listed, folder = set(), ""
    for line in tree.splitlines():
        path, _, about = line.strip().partition("  ")
        assert about.strip() or not path, f"{path} has no description"
        if not line.startswith(" "):
            folder = path if path.endswith("/") else ""
        listed.add(path if not line.startswith(" ") else folder + path)
    missing = [name for name in listed if name and not (ROOT / name).exists()]
    assert not missing, "in the tree and not on disk"
    real = {
        str(path.relative_to(ROOT))
        for pattern in ("gemma_tpu/**/*.py", "recipes/*.py", "configs/*.yaml", "scripts/*.py", "benchmarks/*.py")
        for path in ROOT.glob(pattern)
        if path.stem != "__init__" and "bundled" not in path.parts
    }
    assert not real - listed, "on disk and not in the tree"


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[A-Za-z0-9_.-]+", line)[0] for line in project["dependencies"]}
    used = {name.split(".")[0] for tree in modules().values() for name in imports(tree, inside_functions=True)}
    used -= set(sys.stdlib_module_names) | {"gemma_tpu"} | OPTIONAL
    assert {DISTRIBUTIONS.get(name, name) for name in used} == declared
