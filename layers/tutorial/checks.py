"""Which of a notebook's claims were asserted on this machine, and which were not."""

import ast
import sys

_not_checked: list[str] = []  # one list per kernel, in the order of the cells


def messages(source: str) -> list[str | None]:
    """Return the message of each `assert` in Python source, up to its first placeholder; None where it is no string."""
    found = []
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a reader's half-typed cell makes no claim
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            parts = node.msg.values if isinstance(node.msg, ast.JoinedStr) else [node.msg]
            first = parts[0] if parts else None
            text = first.value if isinstance(first, ast.Constant) else None
            found.append(text if isinstance(text, str) else None)
    return found


def not_checked(sentence: str) -> None:
    """Record and print a claim that this machine cannot check (no GPU, no MNIST): `not checked here: sentence`."""
    if sentence not in _not_checked:
        _not_checked.append(sentence)
    print(f"not checked here: {sentence}")


def closing() -> None:
    """Print how many distinct claims the cells run so far asserted, and which were passed to `not_checked`.

    The claims are the messages of the `assert`s in the cells that IPython has run; outside IPython there are none.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    cells = shell.user_ns["In"] if shell else []
    claims = {text for cell in cells for text in messages(shell.transform_cell(cell)) if text}
    claims = {text for text in claims if not text.startswith(tuple(_not_checked))}
    count = f"{len(claims)} claim{'' if len(claims) == 1 else 's'} asserted here"
    if _not_checked:
        print(f"{count}, {len(_not_checked)} not checked here:")
        print("\n".join(f"  not checked here: {sentence}" for sentence in _not_checked))
    else:
        print(f"{count}: everything above was checked here.")
