"""The errors that foveate raises on purpose: each says what is wrong, where, and what to do."""


class FoveateError(Exception):
    """Base of every error that foveate raises on purpose. Exit status 1 of the command."""

    exit_code = 1


class UserError(FoveateError):
    """The recipe, the data or the command line is wrong: nothing was computed. Exit status 2."""

    exit_code = 2


class RecipeError(UserError):
    """One or more defects of a recipe, all of them at once.

    `problems` holds one line each: ``file:line:column: path: what is wrong``.
    """

    def __init__(self, problems: list[str]):
        self.problems = problems
        noun = "problem" if len(problems) == 1 else "problems"
        super().__init__(f"{len(problems)} {noun} in the recipe\n" + "\n".join(problems))


class DataError(UserError):
    """A sample, an image or a source of data is defective."""


class ModelError(UserError):
    """A model cannot be built, loaded or used the way the recipe asks."""


class PluginError(UserError):
    """A plugin that the recipe or the command needs is missing, broken or in conflict."""


class RunError(UserError):
    """A run folder is in the way, incomplete, or not a run."""


class TrainingError(FoveateError):
    """Training cannot go on: non-finite values, or parts that do not move as the recipe says."""
