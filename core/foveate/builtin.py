"""Core's own encoders, projectors, LLMs, teachers and data sets, through the same hooks as anybody's."""

from foveate.hookspecs import Register, hookimpl

HOOK_API = 1


@hookimpl
def register_encoders(register: Register) -> None:
    register("hf", "foveate.model.encoder:TransformersEncoder")
    register("timm", "foveate.model.timm_encoder:TimmEncoder")


@hookimpl
def register_projectors(register: Register) -> None:
    register("linear", "foveate.model.projector:LinearProjector")
    register("mlp", "foveate.model.projector:MLPProjector")
    register("pixel_shuffle_mlp", "foveate.model.projector:PixelShuffleProjector")


@hookimpl
def register_llms(register: Register) -> None:
    register("hf", "foveate.model.language:TransformersLLM")


@hookimpl
def register_teachers(register: Register) -> None:
    register("patches", "foveate.teachers.patches:PatchTeacher")
    register("features", "foveate.teachers.features:FeatureTeacher")
    register("autoencoder_kl", "foveate.teachers.autoencoders:KLTeacher")
    register("vq", "foveate.teachers.autoencoders:VQTeacher")


@hookimpl
def register_datasets(register: Register) -> None:
    register("llava", "foveate.data.llava:LlavaDataset")
    register("hf", "foveate.data.hub:HubDataset")
