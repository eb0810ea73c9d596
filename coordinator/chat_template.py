"""Renders a model's chat template as transformers does, in a sandbox that also bounds what it may allocate.

Knows nothing of tokenizers or requests. A template comes with a model from the internet: jinja2's immutable sandbox
keeps it from attributes and mutation, the bounds here from memory ('x' * 10**10). Time is bounded only by the length of
template and messages: render templates of models you don't trust at all in a process of their own.
Needs jinja2 (extra `serve`); import this module lazily.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.utils
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from markupsafe import soft_str

from protocol.errors import CheckpointInvalid, RequestInvalid

MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 16 << 20
MAX_NUMBER_BITS = 4096
MAX_PADDING = 10_000
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_PADDING_FILTERS = ("center", "indent", "batch", "slice", "wordwrap")


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Refuses operations whose result would be large; jinja2's own hooks for operators and calls."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _BINOP_CHECKS[operator](left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name == "join" and len(args) == 1:
                args = (list(args[0]),)  # a generator is read once: to count, then to join
            _check_method(owner, name, args, kwargs)
        return super().call(context, called, *args, **kwargs)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_ConcatAsFilter().visit(source), *args, **kwargs)


class _ConcatAsFilter(NodeTransformer):
    """`a ~ b` has no hook of its own in jinja2: make it a filter, so that doubling in a loop is bounded too."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802 - jinja2's name
        self.generic_visit(node)
        return nodes.Filter(
            nodes.List(node.nodes, lineno=node.lineno), "bounded_concat", [], [], None, None, lineno=node.lineno
        )


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`: marks an assistant's words for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's declaration

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without underscore names, which could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` is a legal name for an attribute
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r:.40} starts with an underscore")


def _too_large() -> NoReturn:
    raise SecurityError(f"a value would exceed {MAX_RENDERED_CHARS} characters")


def _check_product(left: Any, right: Any) -> None:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(count, int) and hasattr(sequence, "__len__") and len(sequence) * count > MAX_RENDERED_CHARS:
            _too_large()
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_NUMBER_BITS:
        _too_large()


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_NUMBER_BITS:
        _too_large()


def _check_sum(left: Any, right: Any) -> None:
    if hasattr(left, "__len__") and hasattr(right, "__len__") and len(left) + len(right) > MAX_RENDERED_CHARS:
        _too_large()


def _check_remainder(left: Any, right: Any) -> None:
    if isinstance(left, str):
        _check_format(left)
        if "*" in left:  # a width taken from the arguments
            _check_padding(right if isinstance(right, tuple) else (right,))


_BINOP_CHECKS: dict[str, Callable[[Any, Any], None]] = {
    "*": _check_product,
    "**": _check_power,
    "+": _check_sum,
    "%": _check_remainder,
}


def _check_padding(values: Sequence[Any]) -> None:
    if any(isinstance(value, int) and value > MAX_PADDING for value in values):
        _too_large()


def _check_format(text: str) -> None:
    """Refuse widths of more than four digits; nested ones of str.format are refused whole."""
    digits = 0
    for char in text:
        digits = digits + 1 if char.isdecimal() else 0
        if digits > 4:
            _too_large()


def _check_method(text: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Bound the methods of str whose result can be much longer than what they are given."""
    if name in _PADDING_METHODS:
        _check_padding((*args, *kwargs.values()))
    elif name in ("format", "format_map"):
        _check_format(text)
        if ":{" in text:  # a width taken from the arguments
            _check_padding((*args, *kwargs.values()))
    elif name == "replace" and len(args) >= 2:
        _check_replace(text, args[0], args[1])
    elif name == "join" and args:
        _check_join(text, args[0])


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        count = text.count(old) if old else len(text) + 1
        if len(text) + count * len(new) > MAX_RENDERED_CHARS:
            _too_large()


def _check_join(separator: str, values: Sequence[Any]) -> None:
    if sum(len(separator) + (len(value) if isinstance(value, str) else 0) for value in values) > MAX_RENDERED_CHARS:
        _too_large()


def _printable(value: Any) -> Any:
    """Return `value` unless its text would be large: ten nested `[x, x]` share one x but print it a thousand times."""
    num_chars, stack = 0, [value]
    while stack:
        item = stack.pop()
        num_chars += len(item) if isinstance(item, str) else 64  # more than it prints: bounds the walk as well
        if num_chars > MAX_RENDERED_CHARS:
            _too_large()
        if isinstance(item, (list, tuple, set, frozenset)):
            stack += item
        elif isinstance(item, dict):
            stack += item.keys()
            stack += item.values()
    return value


def _bounded_concat(values: Sequence[Any]) -> str:
    texts = [str(_printable(value)) for value in values]
    if sum(map(len, texts)) > MAX_RENDERED_CHARS:
        _too_large()
    return "".join(texts)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **options: Any) -> str:
    """JSON without HTML escapes, made piece by piece so that its length is known before it is joined."""
    _check_padding((indent, len(indent) if isinstance(indent, str) else 0))
    sort_keys = bool(options.pop("sort_keys", False))
    if options:
        raise TypeError(f"tojson has no option {', '.join(options)}")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return "".join(_bounded(encoder.iterencode(value)))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` without the type behind them."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _bounded_filter(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter that pads: its numbers are checked, jinja2's own marks on it are kept."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_padding((*args, *kwargs.values()))
        return plain(*args, **kwargs)

    checked.__dict__.update(plain.__dict__)
    return checked


def _bounded_replace(plain: Callable[..., Any]) -> Callable[..., Any]:
    def checked(context: Any, text: Any, old: Any, new: Any, *args: Any) -> Any:
        _check_replace(str(text), str(old), str(new))
        return plain(context, text, old, new, *args)

    checked.__dict__.update(plain.__dict__)
    return checked


def _bounded_join(plain: Callable[..., Any]) -> Callable[..., Any]:
    def checked(context: Any, values: Any, separator: str = "", *args: Any, **kwargs: Any) -> Any:
        values = list(values)
        _check_join(str(separator), values)
        return plain(context, values, separator, *args, **kwargs)

    checked.__dict__.update(plain.__dict__)
    return checked


def _bounded_format(plain: Callable[..., Any]) -> Callable[..., Any]:
    def checked(text: Any, *args: Any, **kwargs: Any) -> Any:
        _check_remainder(str(text), args)
        return plain(text, *args, **kwargs)

    return checked


def _environment(now: Callable[[], datetime]) -> _BoundedEnvironment:
    environment = _BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    filters, names = environment.filters, environment.globals
    for name in _PADDING_FILTERS:
        filters[name] = _bounded_filter(filters[name])
    filters["replace"] = _bounded_replace(filters["replace"])
    filters["join"] = _bounded_join(filters["join"])
    filters["format"] = _bounded_format(filters["format"])
    filters["string"] = lambda value: soft_str(_printable(value))
    filters["tojson"] = _to_json
    filters["bounded_concat"] = _bounded_concat
    names["raise_exception"] = _raise_exception
    names["strftime_now"] = lambda form: now().strftime(form)
    names["dict"] = _Dict()
    names["namespace"] = _Namespace
    del names["lipsum"]  # text without bound
    return environment


class ChatTemplate:
    """One compiled template. Rendering is thread-safe."""

    def __init__(self, source: str, where: str, now: Callable[[], datetime]) -> None:
        """Compile `source`; raises CheckpointInvalid, naming `where` it came from, when it is no template."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise CheckpointInvalid(f"the chat template in {where} exceeds {MAX_TEMPLATE_CHARS} characters")
        self._where = where
        try:
            self._template = _environment(now).from_string(source)
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError) as error:
            raise CheckpointInvalid(f"the chat template in {where} is not valid: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """Return the prompt; `variables` are the special tokens and flags the template may name.

        Keys whose value is None are dropped, and `reasoning`, `thinking` and `reasoning_content` stand for each other,
        as in transformers. Raises RequestInvalid when the template refuses the messages or exceeds its bounds.
        """
        chat = [_known_names(message) for message in messages]
        try:
            return "".join(_bounded(self._template.generate(messages=chat, **variables)))
        except Exception as error:  # a template can raise anything that Python can
            raise RequestInvalid(
                f"the model's chat template ({self._where}) does not take these messages: {error}",
                remedy="send roles and contents that the model's template knows, or a plain prompt",
            ) from error


def _known_names(message: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in _REASONING_KEYS if key in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    num_chars = 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > MAX_RENDERED_CHARS:
            _too_large()
        yield piece
