"""Mutation testing: do the tests notice when a line of the code is wrong?

``python -m tests.mutation proxy_fsm/lifecycle.py proxy_fsm/engine.py`` makes small mistakes in a module, one at a
time, and runs the tests on each: the fast ones first, and the slow ones on what has survived them. No file is
changed: each mutant lives in a fork of this process, which has loaded everything but the package. Same code, same
mutants, same numbers. `docs/mutation.md` lists those that survive, and why.
"""

from __future__ import annotations

import argparse
import ast
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType

#: Loaded before forking, since they take longer than most mutants live; nothing of the package is among them.
_PRELOADED = ("hypothesis.stateful", "hypothesis.strategies", "paramiko", "structlog", "transitions")
_FLOOR_PERCENT = 90.0
_TELL_EACH = 50

_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
_CALCULATED: dict[type[ast.operator], type[ast.operator]] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div}
_SWAPPED_NAMES = {"max": "min", "min": "max", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Stage:
    """Tests that are run together, and how long each of them and all of them may take."""

    tests: tuple[str, ...]
    each_s: float
    all_s: float


#: Those of what decides first: they start no thread, and take a second or two.
STAGES = (
    Stage(("tests/test_supervisor.py",), 20, 60),
    Stage(("tests/test_lifecycle.py",), 20, 90),
    Stage(("tests/test_effects.py", "tests/test_engine_faked.py", "tests/testing/test_machine.py"), 20, 120),
    Stage(("tests/test_engine.py", "tests/testing/test_fakes.py"), 20, 240),
)


@dataclass(frozen=True)
class Mutant:
    """One small mistake."""

    number: int
    line: int
    before: str
    after: str

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        same = max(0, len(os.path.commonprefix([before, after])) - 30)  # noqa: RUF071 - they are no paths
        before, after = (("…" if same else "") + text[same : same + 90] for text in (before, after))
        return f"{self.number:4} line {self.line}: {before}  →  {after}"


class Mutator(ast.NodeTransformer):
    """Finds all mutants of a module; makes one of them, where its number is given."""

    def __init__(self, source: str, wanted: int | None = None) -> None:
        self.found: list[Mutant] = []
        self._wanted = wanted
        tree = ast.parse(source)
        self._untouched = set(_untouched(tree))
        self._members: dict[str, list[str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr.isupper():
                members = self._members.setdefault(node.value.id, [])
                members[:] = sorted({*members, node.attr})
        self.tree = ast.fix_missing_locations(self.visit(tree))

    def visit(self, node: ast.AST) -> ast.AST:
        """Take the wanted variant of a node, or go down into it."""
        if id(node) in self._untouched:
            return node
        for before, after, variant in self._variants(node):
            self.found.append(Mutant(len(self.found), getattr(node, "lineno", 0), before, after))
            if self.found[-1].number == self._wanted:
                return ast.copy_location(variant, node)
        return self.generic_visit(node)

    def _variants(self, node: ast.AST) -> Iterator[tuple[str, str, ast.AST]]:
        if isinstance(node, ast.Match):
            yield from _without_cases(node)
        elif isinstance(node, ast.stmt):
            for statement in _worse_statements(node):
                yield ast.unparse(node), ast.unparse(statement), statement
        elif isinstance(node, ast.Attribute):
            yield from self._other_members(node)
        elif isinstance(node, ast.expr):
            for expression in _worse_expressions(node):
                yield ast.unparse(node), ast.unparse(expression), expression

    def _other_members(self, node: ast.Attribute) -> Iterator[tuple[str, str, ast.AST]]:
        members = self._members.get(node.value.id, []) if isinstance(node.value, ast.Name) else []
        if node.attr in members and len(members) > 1:
            other = ast.Attribute(node.value, members[members.index(node.attr) - 1], node.ctx)
            yield ast.unparse(node), ast.unparse(other), other


def _untouched(tree: ast.Module) -> Iterator[int]:
    """What is not run, or not worth a test: annotations, docstrings, decorators, ``__all__``, type-checking blocks."""
    for node in ast.walk(tree):
        match node:
            case ast.AnnAssign(annotation=note) | ast.arg(annotation=ast.expr() as note):
                yield id(note)
            case ast.FunctionDef(returns=note, decorator_list=decorators):
                yield from map(id, [note, *decorators])
            case ast.ClassDef(bases=bases, decorator_list=decorators):
                yield from map(id, [*bases, *decorators])
            case ast.FormattedValue(format_spec=ast.expr() as spec):
                yield id(spec)
            case ast.Expr(value=ast.Constant()) | ast.If(test=ast.Name("TYPE_CHECKING")):
                yield id(node)
            case ast.Assign(targets=[ast.Name("__all__")]):
                yield id(node)


def _without_cases(node: ast.Match) -> Iterator[tuple[str, str, ast.AST]]:
    """Yield the match without one of its cases, and with one of its guards turned round."""
    for index, case in enumerate(node.cases):
        head = f"case {ast.unparse(case.pattern)}"
        others = [*node.cases[:index], *node.cases[index + 1 :]]
        if others and not isinstance(case.body[0], ast.Pass):
            yield head, "(case removed)", ast.Match(node.subject, others)
        if case.guard is not None:
            turned = ast.match_case(case.pattern, _negated(case.guard), case.body)
            cases = [*node.cases[:index], turned, *node.cases[index + 1 :]]
            yield f"{head} if {ast.unparse(case.guard)}", "(guard negated)", ast.Match(node.subject, cases)


def _worse_statements(node: ast.stmt) -> Iterator[ast.stmt]:
    nothing = ast.Constant(None)
    match node:
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield ast.Pass()
        case ast.Assign(value=ast.expr() as value) if not _is_none(value):
            yield ast.Assign(node.targets, nothing, lineno=node.lineno)
        case ast.AnnAssign(value=ast.expr() as value) if not _is_none(value):
            yield ast.AnnAssign(node.target, node.annotation, nothing, node.simple)
        case ast.AugAssign():
            yield ast.Pass()
        case ast.Return(value=ast.expr() as value) if not _is_none(value):
            yield ast.Return(nothing)
        case ast.Return(value=None) if True:
            yield ast.Pass()
        case ast.If(test=test) if _is_plain(test):
            yield ast.If(_negated(test), node.body, node.orelse)
        case ast.While(test=test) if _is_plain(test):
            yield ast.While(_negated(test), node.body, node.orelse)


def _worse_expressions(node: ast.expr) -> Iterator[ast.expr]:  # noqa: C901, PLR0912 - one flat case a kind
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in _COMPARED:
            yield ast.Compare(node.left, [_COMPARED[type(operator)]()], node.comparators)
        case ast.BoolOp(op=operator, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
            for index in range(len(values)):
                left = [*values[:index], *values[index + 1 :]]
                yield left[0] if len(left) == 1 else ast.BoolOp(operator, left)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.BinOp(op=calculation) if type(calculation) in _CALCULATED:
            yield ast.BinOp(node.left, _CALCULATED[type(calculation)](), node.right)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Lambda(args=arguments):
            yield ast.Lambda(arguments, ast.Constant(None))
        case ast.Set(elts=elements) if len(elements) > 1:
            for index in range(len(elements)):
                yield ast.Set([*elements[:index], *elements[index + 1 :]])
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as number):
            yield ast.Constant(number + 1)
        case ast.Constant(value=str(text)):
            yield ast.Constant(f"XX{text}")
        case ast.Name(id=name) if name in _SWAPPED_NAMES:
            yield ast.Name(_SWAPPED_NAMES[name], node.ctx)
        case ast.Call(func=function, args=arguments, keywords=keywords):
            for index in range(len(arguments)) if len(arguments) > 1 else ():
                yield ast.Call(function, [*arguments[:index], *arguments[index + 1 :]], keywords)
            for index in range(len(keywords)):
                yield ast.Call(function, arguments, [*keywords[:index], *keywords[index + 1 :]])


def _negated(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)


def _is_plain(test: ast.expr) -> bool:
    """Whether turning it round is not done anyway, where the expression itself is mutated."""
    return isinstance(test, ast.Name | ast.Attribute | ast.Call)


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


class _Replaced(MetaPathFinder, Loader):
    """Has one module loaded from code that is in no file."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self._name, self._path, self._code = name, path, code

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        return spec_from_file_location(fullname, self._path, loader=self) if fullname == self._name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)  # noqa: S102 - a mutant


def passes(path: Path, code: CodeType, stage: Stage) -> bool:
    """Tell whether the tests pass, on a fork of this process, with other code in place of a module's."""
    scratch = tempfile.mkdtemp(prefix="mutant-")  # no TemporaryDirectory: a fork of a test that ends would remove it
    child = os.fork()
    if child == 0:
        _test_and_exit(path, code, stage, scratch)
    handle = os.pidfd_open(child)
    try:
        if not select.select([handle], [], [], stage.all_s)[0]:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(handle)
    ended = os.waitpid(child, 0)[1]
    shutil.rmtree(scratch)
    return os.waitstatus_to_exitcode(ended) == 0


def _test_and_exit(path: Path, code: CodeType, stage: Stage, scratch: str) -> None:
    result = 1
    try:
        silence = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(silence, descriptor)
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = scratch
        sys.meta_path.insert(0, _Replaced(".".join(path.with_suffix("").parts), path, code))
        options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-o", f"timeout={stage.each_s}"]
        result = pytest.main([*options, "--hypothesis-seed=0", f"--basetemp={scratch}/pytest", *stage.tests])
    finally:
        os._exit(result)


def survivors(path: Path, only: Sequence[int], *, fast: bool) -> tuple[int, list[Mutant]]:
    """Test the mutants of a module, telling how it goes; return how many there were, and which have survived."""
    source = path.read_text()
    stages = STAGES[:-1] if fast else STAGES
    original = compile(source, str(path), "exec")
    for stage in stages:
        if not passes(path, original, stage):
            raise SystemExit(f"The tests fail without any mutant: {' '.join(stage.tests)}")
    mutants = [mutant for mutant in Mutator(source).found if not only or mutant.number in only]
    left: list[Mutant] = []
    for done, mutant in enumerate(mutants):
        if done % _TELL_EACH == 0:
            tell(f"{path}: {done} of {len(mutants)} mutants tested")
        code = compile(ast.unparse(Mutator(source, mutant.number).tree), str(path), "exec")
        if all(passes(path, code, stage) for stage in stages):
            left.append(mutant)
            tell(f"survived {mutant}")
    return len(mutants), left


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description="Test the tests: run them on mutants of a module.")
    parser.add_argument("modules", nargs="+", type=Path, help="paths, from the repository's root")
    parser.add_argument("--fast", action="store_true", help="leave the slow tests out")
    parser.add_argument("--only", nargs="+", type=int, default=[], metavar="N", help="only the mutants so numbered")
    parser.add_argument("--list", action="store_true", help="list the mutants and test none")
    options = parser.parse_args()
    for name in _PRELOADED:
        import_module(name)
    enough = True
    for path in options.modules:
        if options.list:
            tell("\n".join(str(mutant) for mutant in Mutator(path.read_text()).found))
            continue
        began = time.monotonic()
        number, left = survivors(path, options.only, fast=options.fast)
        killed, took_s = number - len(left), time.monotonic() - began
        percent = 100 * killed / number
        enough &= percent >= _FLOOR_PERCENT
        tell(f"{path}: {number} mutants, {killed} killed ({percent:.1f} %), {len(left)} survived; {took_s:.0f} s")
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
