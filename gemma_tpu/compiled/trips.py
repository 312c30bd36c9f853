"""How often a loop of a compiled module runs."""

import re

from gemma_tpu.compiled.hlo import Computation, Instruction, Module


def trip_count(module: Module, loop: Instruction, caller: Computation) -> tuple[int | None, str]:
    """The compiler's word, else from limit, start and step of the loop's counter; with it what had to be assumed."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1]), ""
    condition = module.called(loop, "condition")
    body = module.called(loop, "body")
    compare, owner = _compare(module, condition)
    direction = compare.attribute("direction") if compare else None
    operands = [_outside(owner, name, condition) for name in compare.operands] if compare else []
    places = [one.index for one in operands if one and one.opcode == "get-tuple-element"]
    counters = {place: step for place in places if (step := _step(body, place))}
    limits = [number for number in map(_literal, operands) if number is not None]
    limits += [number for place in places if place not in counters and (number := _start(caller, loop, place))]
    if direction in (None, "EQ") or len(counters) != 1 or len(limits) != 1:
        return None, ""
    counter, step = next(iter(counters.items()))
    start = _start(caller, loop, counter)
    distance = limits[0] - (start or 0)
    count = distance // step + 1 if direction in ("LE", "GE") else -(-distance // step)
    return max(0, count), "" if start is not None else f"the counter of the loop {loop.name} starts at 0"


def _compare(module: Module, condition: Computation) -> tuple[Instruction | None, Computation]:
    """The comparison at a condition's root, which may be inside of a fusion."""
    root: Instruction | None = condition.root
    owner = condition
    while root is not None and root.opcode in ("fusion", "bitcast", "copy"):
        if root.opcode == "fusion":
            owner = module.computations[root.called[0]]
            root = owner.root
        else:
            root = owner.by_name.get(root.operands[0])
    return (root, owner) if root is not None and root.opcode == "compare" else (None, owner)


def _outside(owner: Computation, name: str, condition: Computation) -> Instruction | None:
    """An operand of the comparison, followed out of the condition's fusion to the condition itself."""
    found = owner.by_name.get(name)
    if found is not None and found.opcode == "parameter" and owner is not condition:
        call = next((one for one in condition.instructions if one.called == (owner.name,)), None)
        return condition.by_name.get(call.operands[int(found.arguments)]) if call else None
    return found


def _literal(found: Instruction | None) -> int | None:
    if found is None or found.opcode != "constant" or not re.fullmatch(r"-?\d+", found.arguments):
        return None
    return int(found.arguments)


def _start(caller: Computation, loop: Instruction, index: int) -> int | None:
    """The counter's first value; None where the loop's operand cannot be followed to a constant."""
    found = caller.by_name.get(loop.operands[0])
    if found is None or found.opcode != "tuple":
        return None
    found = caller.by_name.get(found.operands[index])
    while found is not None and found.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        found = caller.by_name.get(found.operands[0])
    return _literal(found)


def _step(body: Computation, index: int) -> int | None:
    """What one turn adds to the counter: the constants on the way from the root back to the parameter."""
    if body.root.opcode != "tuple":
        return None
    step, found = 0, body.by_name.get(body.root.operands[index])
    while found is not None:
        if found.opcode == "get-tuple-element":
            return step if found.index == index else None
        if found.opcode not in ("add", "copy", "bitcast"):
            return None
        literals = [_literal(body.by_name.get(operand)) for operand in found.operands]
        if found.opcode == "add":
            if literals.count(None) != 1:
                return None
            step += next(each for each in literals if each is not None)
        found = body.by_name.get(found.operands[literals.index(None)])
    return None
