"""The program: parses arguments and calls."""


def main() -> None:
    raise SystemExit("not built yet")
