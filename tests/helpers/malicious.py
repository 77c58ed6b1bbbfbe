"""Objects whose pickles run code."""


class Call:
    """Object that is pickled as a call of ``function``."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        raise AssertionError('only for callable()')
