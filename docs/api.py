"""Pages of the reference, read from the text of the modules: nothing is imported, and types and defaults stand as they were written."""
import ast
import io
import re
import tokenize
from pathlib import Path

LONG = 100  # characters; a value or a signature that takes more is not repeated above the table


def comments(text: str) -> dict[int, str]:
    "What stands behind a # in each line."
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in found if token.type == tokenize.COMMENT}


def prose(text: str) -> str:
    "A docstring or a comment is Markdown but for signs that it means as they are. Code in backticks stays."
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if i % 2 else re.sub(r"([*_$<\[\]|])", r"\\\1", piece) for i, piece in enumerate(pieces))


def arguments(node: ast.FunctionDef) -> list[tuple[str, ast.arg, ast.expr | None]]:
    "Name as it is called, argument and default, without `self`."
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    found = [(arg.arg, arg, default) for arg, default in zip(plain, defaults)]
    found += [(f"*{a.vararg.arg}", a.vararg, None)] if a.vararg else []
    found += [(arg.arg, arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults)]
    found += [(f"**{a.kwarg.arg}", a.kwarg, None)] if a.kwarg else []
    return [one for one in found if one[0] != "self"]


def fields(node: ast.ClassDef) -> list[tuple[str, ast.AnnAssign, ast.expr | None]]:
    "The same of a dataclass."
    return [(ast.unparse(field.target), field, field.value) for field in node.body
            if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).startswith("ClassVar")]


def function(node: ast.AST, kind: str) -> ast.FunctionDef | None:
    "A method of a class by its name, if it has one."
    return next((f for f in getattr(node, "body", []) if isinstance(f, ast.FunctionDef) and f.name == kind), None)


def signature(found: list) -> str:
    "Names and defaults; types are in the table below it."
    text = ", ".join(name if default is None else f"{name}={ast.unparse(default)}" for name, _, default in found)
    return text if len(text) < LONG else ", ".join(name for name, _, _ in found) if len(found) < 8 else "..."


def code(node: ast.expr | None) -> str:
    "An expression as it was written, fit for a table."
    return f"`{ast.unparse(node)}`".replace("|", r"\|") if node else ""


def table(found: list, said: dict[int, str], returns: ast.expr | None = None) -> str:
    "A line an argument, and one for what comes back; types last, because they are long."
    ends = {arg.end_lineno for _, arg, _ in found}
    lines = [f"| `{name}` | {code(default)} | {prose(said.get(arg.end_lineno, ''))} | {code(arg.annotation)} |" for name, arg, default in found]
    if returns and ast.unparse(returns) != "None":
        comment = "" if returns.end_lineno in ends else prose(said.get(returns.end_lineno, ""))
        lines.append(f"| returns | | {comment} | {code(returns)} |")
    return "\n".join(["| | default | | type |", "|---|---|---|---|", *lines]) if lines else ""


def entry(kind: str, name: str, parts: list[str], fence: str = "````", option: str = "") -> str:
    "A directive of Sphinx's Python domain, so that the name can be linked to and found."
    return "\n".join([f"{fence}{{py:{kind}}} {name}", *([option] if option else []), "", "\n\n".join(filter(None, parts)), fence])


def callable_entry(kind: str, node: ast.FunctionDef, said: dict[int, str], option: str = "") -> str:
    "A function or a method."
    found = arguments(node)
    return entry(kind, f"{node.name}({signature(found)})", [prose(ast.get_docstring(node) or ""), table(found, said, node.returns)], option=option)


def class_entry(node: ast.ClassDef, said: dict[int, str]) -> str:
    "A class with its public methods that say what they are for."
    made = function(node, "__init__")
    dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    found = fields(node) if dataclass else arguments(made) if made else []
    shown = [f for f in node.body if isinstance(f, ast.FunctionDef) and ast.get_docstring(f) and (f.name == "__call__" or not f.name.startswith("_"))]
    methods = [property_entry(f) if is_property(f) else callable_entry("method", f, said) for f in shown]
    return entry("class", f"{node.name}({signature(found)})", [prose(ast.get_docstring(node) or ""), table(found, said), *methods], "`````")


def is_property(node: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def property_entry(node: ast.FunctionDef) -> str:
    returns = f" (`{ast.unparse(node.returns)}`)" if node.returns else ""
    return entry("property", node.name, [prose(ast.get_docstring(node)) + returns])


def target(node: ast.Assign | ast.AnnAssign) -> ast.expr:
    return node.target if isinstance(node, ast.AnnAssign) else node.targets[0]


def constant_entry(name: str, node: ast.Assign | ast.AnnAssign, said: dict[int, str]) -> str:
    value = ast.unparse(node.value)
    whole = isinstance(target(node), ast.Name) and len(value) < LONG
    return entry("data", name, [prose(said.get(node.lineno, ""))], option=f":value: {value}" if whole else "")


def public(tree: ast.Module) -> list[str]:
    "What a module exports."
    return next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")


def definitions(tree: ast.Module) -> dict[str, ast.AST]:
    "Where each name is made."
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found |= {name.id: node for name in ast.walk(target(node)) if isinstance(name, ast.Name)}
    return found


def described(name: str, node: ast.AST, said: dict[int, str]) -> str:
    "The entry of a public name, whatever it is."
    if isinstance(node, ast.ClassDef):
        return class_entry(node, said)
    return callable_entry("function", node, said) if isinstance(node, ast.FunctionDef) else constant_entry(name, node, said)


def page(path: Path, chapter: str) -> str:
    "The page of a module: its public names, in the order of the chapter."
    text = path.read_text(encoding="utf-8")
    tree, said = ast.parse(text), comments(text)
    made = definitions(tree)
    entries = [described(name, made[name], said) for name in sorted(public(tree), key=lambda name: made[name].lineno)]
    head = [f"# dino_edu.{path.stem}", prose(ast.get_docstring(tree)), f"From the chapter [{chapter}](../nbs/{chapter}.ipynb).",
            f"```{{py:module}} dino_edu.{path.stem}\n```"]
    return "\n\n".join([*head, *entries]) + "\n"
