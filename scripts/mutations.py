"""Small wrong changes to one source file, each by its bytes: what `mutate.py` breaks the core with.

Comparisons flip, bounds move by one, + turns into -, `not` goes, arguments swap, constants and axes change, a statement
is dropped. Messages, annotations and decorators are left alone: no test of behaviour could or should notice those.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FLIPPED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}  # fmt: skip
AXES = ("axis", "dim", "axes")


@dataclass(frozen=True)
class Mutation:
    """One change of one file."""

    kind: str
    line: int
    text: str  # of that line
    before: str
    after: str
    start: int  # in bytes of the file
    stop: int

    def of(self, source: bytes) -> bytes:
        return source[: self.start] + self.after.encode() + source[self.stop :]

    @property
    def change(self) -> str:
        return f"{' '.join(self.before.split())} -> {self.after}"


def mutations(path: Path) -> list[Mutation]:
    """Every change that this file offers, in its order, each of which still parses."""
    source = path.read_bytes()
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    return [one for one in finder.found if _parses(one.of(source))]


def _parses(source: bytes) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


class _Finder(ast.NodeVisitor):
    def __init__(self, source: bytes):
        self.found: list[Mutation] = []
        self._source = source
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def _add(self, kind: str, node: ast.expr | ast.stmt, after: str) -> None:
        start = self._lines[node.lineno - 1] + node.col_offset
        stop = self._lines[node.end_lineno - 1] + node.end_col_offset
        before = self._source[start:stop].decode()
        text = self._source[self._lines[node.lineno - 1] : self._lines[node.lineno]].decode().strip()
        self.found.append(Mutation(kind, node.lineno, text, before, after, start, stop))

    def _put(self, kind: str, node: ast.expr, new: ast.expr) -> None:
        self._add(kind, node, f"({ast.unparse(new)})")

    # --- what is left alone ---

    def visit_Assert(self, node: ast.Assert) -> None:
        """It tells the type checker something."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """A message."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        name = node.targets[0].id if isinstance(node.targets[0], ast.Name) else ""
        if not (node.col_offset == 0 and name[:1].isupper() and not name.isupper()):  # an alias of a type
            self.visit(node.value)
        if isinstance(node.targets[0], ast.Attribute | ast.Subscript):
            self._add("dropped statement", node, "pass")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    # --- statements ---

    def visit_Raise(self, node: ast.Raise) -> None:
        if node.exc is not None:
            self._add("dropped statement", node, "pass")

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._add("dropped statement", node, "pass")
        self.visit(node.value)
        if after := OPERATORS.get(type(node.op)):
            changed = ast.AugAssign(node.target, after(), node.value)
            self._add("operator", node, ast.unparse(changed))

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self._add("dropped statement", node, "pass")
            self.visit(node.value)
        elif isinstance(node.value, ast.Yield | ast.YieldFrom) and node.value.value is not None:
            self.visit(node.value.value)

    def visit_Continue(self, node: ast.Continue) -> None:
        self._add("dropped statement", node, "pass")

    visit_Break = visit_Continue

    def visit_If(self, node: ast.If | ast.While | ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    visit_While = visit_IfExp = visit_If

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._negate(test)
        self.generic_visit(node)

    def _negate(self, test: ast.expr) -> None:
        plain = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        if not plain and not isinstance(test, ast.Compare | ast.BoolOp | ast.NamedExpr):
            self._put("negated condition", test, ast.UnaryOp(ast.Not(), test))

    # --- expressions ---

    def visit_Compare(self, node: ast.Compare) -> None:
        for place, op in enumerate(node.ops):
            ops = [*node.ops[:place], FLIPPED[type(op)](), *node.ops[place + 1 :]]
            self._put("comparison", node, ast.Compare(node.left, ops, node.comparators))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self._put("and/or", node, ast.BoolOp(other, node.values))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._put("dropped not", node, node.operand)
        elif isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self._put("operator", node, node.operand)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        text = any(isinstance(one, ast.JoinedStr) or isinstance(getattr(one, "value", None), str)
                   for one in (node.left, node.right))  # fmt: skip
        if (other := OPERATORS.get(type(node.op))) and not text:
            self._put("operator", node, ast.BinOp(node.left, other(), node.right))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            return
        for place, (one, other) in enumerate(zip(node.args, node.args[1:], strict=False)):
            # Two of one form: (shape, dtype) the other way round would only crash.
            if type(one) is type(other) is not ast.Starred and ast.dump(one) != ast.dump(other):
                args = [*node.args[:place], other, one, *node.args[place + 2 :]]
                self._put("swapped arguments", node, ast.Call(node.func, args, node.keywords))
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg == "strict":  # a guard of what cannot happen
            return
        try:
            number = ast.literal_eval(node.value) if node.arg in AXES else None
        except ValueError:
            number = None
        if isinstance(number, int):
            self._put("axis", node.value, ast.Constant(-1 if number == 0 else 0))
        else:
            self.visit(node.value)

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None and not isinstance(bound, ast.Constant):
                self._put("off by one", bound, ast.BinOp(bound, ast.Add(), ast.Constant(1)))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._put("constant", node, ast.Constant(not node.value))
        elif isinstance(node.value, int):
            self._put("off by one", node, ast.Constant(node.value + 1))
            if node.value > 0:
                self._put("off by one", node, ast.Constant(node.value - 1))
        elif isinstance(node.value, float):
            self._put("constant", node, ast.Constant(node.value * 2 or 1.0))


def spread(offered: dict[str, list[Mutation]], draw) -> Iterator[tuple[str, Mutation]]:
    """All of them, in an order by `draw`: file after file in turn, and of each file one kind after another, so that
    neither a long file nor a frequent kind of change fills a sample."""
    queues = {}
    for name in sorted(offered):
        kinds: dict[str, list[Mutation]] = {}
        for one in offered[name]:
            kinds.setdefault(one.kind, []).append(one)
        for found in kinds.values():
            draw.shuffle(found)
        order = sorted(kinds)
        draw.shuffle(order)
        longest = max(map(len, kinds.values()), default=0)
        queues[name] = iter([kinds[kind][turn] for turn in range(longest) for kind in order if turn < len(kinds[kind])])
    names = sorted(queues)
    while names:
        draw.shuffle(names)
        for name in list(names):
            if (one := next(queues[name], None)) is None:
                names.remove(name)
            else:
                yield name, one
