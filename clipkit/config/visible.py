"""Text of unknown origin, for people to read: file names, captions and messages of libraries that quote them."""


def visible(text: str) -> str:
    r"""Write what no terminal should get (control characters, broken surrogates, marks that turn the writing round) as \x1b."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)
