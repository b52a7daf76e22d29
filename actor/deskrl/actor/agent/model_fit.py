"""Check of the action language of a run against its model, and the model that a language requires."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from deskrl.actor.agent.action_language import ActionLanguage, ToolApiLanguage
from deskrl.actor.agent.language_registry import ACTION_LANGUAGES, select_language
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object
from deskrl.core.prompt_rendering import read_image_sizing
from deskrl.models.architectures import ARCHITECTURES, Architecture, architecture_of, load_architecture

_DEFAULT_ARCHITECTURE = "qwen2_5_vl"
"""Architecture that is built if neither the configuration nor the action language names one."""
_SHAPES_ARCHITECTURE = "qwen2_5_vl"
"""Architecture of the values of `model.build` other than `tiny`."""
_HINT = "copy the file from the original model"


def built_architecture(config: RunConfig) -> str:
    """Return the name of the architecture of the model that a run builds (`model.build`)."""
    if config.model.build != "tiny":
        return _SHAPES_ARCHITECTURE
    preferred = select_language(config.agent).architectures
    return config.model.architecture or (preferred[0] if preferred else _DEFAULT_ARCHITECTURE)


def check_language(config: RunConfig) -> None:
    """Check that the model of a run and its action language belong together.

    A model directory that is not on this machine is not checked, and of an external server only the protocol.

    Raises:
        UserError: the action language or the architecture cannot be used, the model has another architecture than the
            published models of the language, its image processor scales screenshots to another size than the one in
            which the language counts coordinates, or the protocol of an external server requires another language.
    """
    language = select_language(config.agent)
    if config.inference.external_url is not None:
        _check_external_api(config, language)
        return
    model = config.model
    if model.architecture is not None:
        load_architecture(model.architecture)
    if model.path is None:
        built = built_architecture(config)
        if model.architecture not in (None, built):
            raise UserError(f"model.build = {model.build} has the architecture {built}", "unset model.architecture")
        _check_architecture(config, language, load_architecture(built), f"model.build = {model.build}")
    elif (model.path / "config.json").is_file():
        content = read_json_object(model.path / "config.json", _HINT)
        if model.architecture is None and content.get("model_type") not in ARCHITECTURES.names():
            return  # reported by `check_complete`, after what the directory lacks
        architecture = architecture_of(content, model.path, model.architecture)
        _check_architecture(config, language, architecture, str(model.path))
        if not language.has_relative_coordinates:
            _check_image_size(config, language)


def _check_external_api(config: RunConfig, language: ActionLanguage) -> None:
    api = config.inference.external_api
    if api == "chat_completions" or (isinstance(language, ToolApiLanguage) and language.api == api):
        return
    raise UserError(
        f"inference.external_api = {api} requires the action language of its tools, but agent.action_language = "
        f"{config.agent.action_language}",
        f"set agent.action_language to {' or '.join(_languages(lambda it: getattr(it, 'api', None) == api))}",
    )


def _check_architecture(config: RunConfig, language: ActionLanguage, architecture: Architecture, model: str) -> None:
    name = config.model.architecture or architecture.model_type
    if not language.architectures or name in language.architectures:
        return
    fitting = _languages(lambda it: name in it.architectures)
    wanted = " or ".join(load_architecture(other).title for other in language.architectures)
    raise UserError(
        f"{model} is a {architecture.title} model, but agent.action_language = {config.agent.action_language} requires "
        f"{wanted}",
        f"set agent.action_language to {' or '.join(fitting) or 'a language of your own'}",
    )


def _languages(fits: Callable[[type[ActionLanguage]], bool]) -> Iterator[str]:
    """Yield the names of the built-in and installed action languages that fit."""
    for name in ACTION_LANGUAGES.names():
        try:
            if fits(ACTION_LANGUAGES.load(name)):
                yield name
        except UserError:  # an installed package whose entry point is defective
            continue


def _check_image_size(config: RunConfig, language: ActionLanguage) -> None:
    folder, sent = config.model.path, config.image_size
    assert folder is not None
    seen, counted = read_image_sizing(folder).scaled_size(*sent), language.coordinate_range(*sent)
    if seen != counted:
        shown = [f"{width} x {height}" for width, height in (seen, counted, sent)]
        raise UserError(
            f"{folder}: the image processor scales screenshots of {shown[2]} to {shown[0]}, but coordinates of "
            f"{language.title} refer to {shown[1]}",
            f"set agent.image_width and agent.image_height to {seen[0]} and {seen[1]}",
        )
