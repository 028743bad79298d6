"""The one error that a request for a sample model can end in."""


class ModelError(ValueError):
    """A request that no model can be built for; its text is one sentence for the user."""
