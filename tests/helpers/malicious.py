"""Objects whose pickles run code, for the tests of safe reading."""


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        raise AssertionError('Only to look callable to the pickler.')
