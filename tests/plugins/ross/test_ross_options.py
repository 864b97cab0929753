"""Options of ROSS: the paper's values where nothing is said, and one error, at its line, for what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from foveate.errors import ModelError, RecipeError
from foveate.objective import ObjectiveContext
from foveate.recipe_file import load_recipe
from foveate.types import EncoderSpec
from tests.corpus import recipe_dict
from tests.plugins.ross.reference import TEACHERS, chosen

KL, RAW = TEACHERS["kl"], TEACHERS["raw"]


def test_what_is_left_out_is_the_papers() -> None:
    options: Any = chosen({"teacher": KL}).options
    assert (options.variant, options.measure, options.schedule, options.prediction) == (
        "denoise", "mse", "cosine", "epsilon",
    )  # fmt: skip
    assert options.denoiser.model_dump() == {"type": "dit", "depth": 3, "width": 1024, "heads": 16}
    assert (options.draws, options.mask_padding, options.head) == (4, False, None)
    assert options.sampling.model_dump() == {"sampler": "ddim", "steps": 50}
    for variant, measure in {"regress_latents": "cosine", "regress_latents_to_pixels": "mse"}.items():
        regressing: Any = chosen({"variant": variant, "teacher": KL}).options
        assert regressing.measure == measure and regressing.head.model_dump() == {"depth": 2, "width": None}
        assert regressing.denoiser is regressing.draws is regressing.schedule is regressing.sampling is None
    assert chosen({"variant": "regress_pixels", "teacher": RAW}).options.measure == "mse"  # type: ignore[attr-defined]
    assert chosen({"teacher": KL, "denoiser": {"type": "mlp"}}).options.denoiser.heads is None  # type: ignore[attr-defined]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"measure": "cosine"}, "measure", "cosine is for `variant: regress_latents`; denoise is measured by mse"),
    ({"variant": "regress_pixels", "teacher": RAW, "measure": "cosine"}, "measure", "regress_pixels is measured by"),
    ({"variant": "regress_pixels"}, "teacher", "needs the teacher `patches`"),
    ({"variant": "regress_latents", "teacher": RAW}, "teacher", "that of patches is regress_pixels"),
    ({"variant": "regress_latents_to_pixels", "teacher": "features"}, "teacher", "a decoder, which features lacks"),
    ({"variant": "regress_latents", "draws": 2}, "draws", "is for `variant: denoise`, not for regress_latents"),
    ({"variant": "regress_latents", "schedule": "cosine"}, "schedule", "is for `variant: denoise`"),
    ({"variant": "regress_latents", "prediction": "v"}, "prediction", "is for `variant: denoise`"),
    ({"variant": "regress_latents", "denoiser": {"depth": 1}}, "denoiser", "is for `variant: denoise`"),
    ({"variant": "regress_latents", "sampling": {"steps": 5}}, "sampling", "is for `variant: denoise`"),
    ({"head": {"depth": 2}}, "head", "is for the variants that regress"),
    ({"denoiser": {"type": "mlp", "heads": 2}}, "denoiser.heads", "has no attention: leave `heads` out"),
    ({"denoiser": {"width": 24}}, "denoiser", "16 heads do not divide a width of 24"),
    ({"denoiser": {"width": 18, "heads": 2}}, "denoiser.width", "multiple of 4"),
    ({"denoiser": {"type": "unet"}}, "denoiser.type", "must be 'dit', 'vit' or 'mlp'"),
    ({"sampling": {"steps": 1001}}, "sampling.steps", "less than or equal to 1000"),
    ({"sampling": {"sampler": "euler"}}, "sampling.sampler", "must be 'ddim' or 'ddpm'"),
    ({"draws": 0}, "draws", "greater than 0"),
    ({"query_grid": [2, 2]}, "query_grid", "unknown key 'query_grid'"),
    ({"type": "ross_generative", "query_grid": [0, 2]}, "query_grid", "at least one row and one column"),
    ({"type": "ross_generative", "variant": "denoise"}, "variant", "unknown key 'variant'"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "key", "told"), WRONG, ids=[f"{key}-{n}" for n, (_, key, _) in enumerate(WRONG)])
def test_what_does_not_fit_is_an_error_at_its_line(
    given: dict[str, Any], key: str, told: str, tmp_path: Path, shared_corpus: Path
) -> None:
    recipe = recipe_dict(shared_corpus, objectives={"mine": {"type": "ross", "teacher": KL, **given}})
    text = yaml.safe_dump(recipe, sort_keys=False)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    message = str(caught.value)
    assert f"objectives.mine.{key}: " in message and told in message
    [place] = [line for line in message.splitlines() if f"objectives.mine.{key}: " in line]
    number = int(place.split("recipe.yaml:")[1].split(":")[0])
    start = text.splitlines()[number - 1].strip()
    assert start.startswith((key.split(".")[-1], key.split(".")[0])), (place, start)


def test_all_defects_are_told_at_once(tmp_path: Path, shared_corpus: Path) -> None:
    options = {"variant": "regress_latents", "teacher": RAW, "draws": 2, "schedule": "linear", "measure": "mae"}
    recipe = recipe_dict(shared_corpus, objectives={"ross": options})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    for key in ("teacher", "draws", "schedule", "measure"):
        assert f"objectives.ross.{key}: " in str(caught.value)


def test_a_teacher_of_another_grid_is_refused() -> None:
    from foveate.teachers.patches import PatchTeacher

    class Coarse(PatchTeacher):
        @classmethod
        def describe(cls, options: Any, context: ObjectiveContext) -> Any:
            from foveate import TeacherSpec

            return TeacherSpec(4, (2, 2), (8, 8))

    found: Any = chosen({"teacher": RAW})
    object.__setattr__(found.options.teacher, "cls", Coarse)
    spec = EncoderSpec(image_size=16, grid=(4, 4), width=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(ModelError, match=r"rows on a grid of \(2, 2\), and visual tokens are on one of \(4, 4\)"):
        found.cls(found.options, ObjectiveContext("ross", 12, 2, (4, 4), spec))
