"""Keys of samples: what tells the pictures of a task apart, in files and for people."""


def printable(text: str) -> str:
    """Write what is no text in it (bytes of a file name that is not UTF-8) as escapes, as in "caf\\udce9.jpg"."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
