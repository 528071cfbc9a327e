"""What to do next with a run: the advice on its batch, and commands to copy."""

from dataclasses import dataclass

from bigbatch.lm.report.html import tag, text


@dataclass(frozen=True)
class Guidance:
    """Advice and commands for a run; the callers of `page` know how to make them.

    Attributes:
        advice: First sentence of ``bigbatch advise``; None if there is nothing to advise on.
        advise_command: The command that prints all of it.
        commands: Commands that go on with the run, each perhaps with an explanation after three spaces.
    """

    advice: str | None = None
    advise_command: str = ""
    commands: tuple[str, ...] = ()


def next_commands(found: Guidance) -> str:
    """Return the commands as a list, or nothing without any."""
    if not found.commands:
        return ""
    items = []
    for line in found.commands:
        command, _, words = line.partition("   ")
        items.append(tag("li", tag("code", text(command)) + (f" {text(words)}" if words else "")))
    return tag("div", tag("p", "Next:") + tag("ul", "".join(items)), class_="next")


def batch_advice(found: Guidance) -> str:
    """Return the advice, with the command that prints more of it."""
    if found.advice is None:
        return ""
    more = f" See also {tag('code', text(found.advise_command))}"
    return tag("p", text(found.advice) + more, class_="advice")
