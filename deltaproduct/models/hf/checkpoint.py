"""Folders that transformers and SequenceModel both load."""

import copy
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from deltaproduct.errors import UsageError
from deltaproduct.files import read_whole, updated_folder, whole_folder
from deltaproduct.models.folders import CONFIG
from deltaproduct.models.hf.manifest import check_against_manifest
from deltaproduct.models.saving import check_is_its_configuration, own_class, shares_memory, without_sharing
from deltaproduct.models.size import check_model, check_stored, stored_shapes

REMOTE = "modeling_deltaproduct"  # the module that a folder carries for trust_remote_code=True
SOURCE = Path(__file__).with_name("remote.py")
AUTO_MAP = {
    "AutoConfig": f"{REMOTE}.DeltaProductConfig",
    "AutoModel": f"{REMOTE}.DeltaProductModel",
    "AutoModelForCausalLM": f"{REMOTE}.DeltaProductForCausalLM",
}
HEAD = "head.weight"
VOCABULARY = {"embedding.weight", HEAD}


def check_stored_size(
    kind: type[PreTrainedModel], name_or_path: Any, ignore_mismatched_sizes: bool, options: dict[str, Any]
) -> None:
    """Whether a folder's configuration is of its weights, as far as shows before a model is built: what does not fit
    would be built, and drawn anew.

    Raises:
        UsageError: it describes more layers than there are tensors, another embedding, or what memory cannot hold.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        return
    folder, config = Path(name_or_path) / (options.get("subfolder") or ""), options.get("config")
    if config is None and (folder / CONFIG).is_file():
        config = kind.config_class.from_pretrained(folder)
    describe = getattr(config, "model_config", None)
    if describe is None or (shapes := stored_shapes(folder)) is None:
        return
    described = describe()
    if ignore_mismatched_sizes:
        shapes.pop("embedding.weight", None)
    check_stored(described, shapes, folder)
    check_model(described)


class CheckpointedModel(PreTrainedModel):
    """A model of transformers' that saves as carefully as `SequenceModel` and loads as strictly."""

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """transformers' files, a manifest of them, and the module that `trust_remote_code=True` runs.

        Other files in the folder, such as a tokenizer's, stay. What is written is the model as it is: the configuration
        says that head and embedding are tied if they share their weight now. An adapter that transformers has put into
        the model is saved by itself, and a quantised model with its quantisation, as transformers does for every model.

        Raises:
            UsageError: the folder cannot be written, or the model is no longer the one that its configuration describes
                (a part was replaced, resized, wrapped or given other options); the message says where. What this method
                wrote there before is untouched.
        """
        if kwargs.pop("push_to_hub", False):
            raise UsageError("save_pretrained only writes a folder; model.push_to_hub(...) uploads the model.")
        tied, says = self._is_tied(), self.config.tie_word_embeddings
        self.config.tie_word_embeddings = says if tied is None else tied
        try:
            if kwargs.get("state_dict") is None and not self._saved_by_transformers():
                with torch.device("meta"):
                    described = own_class(self)(copy.deepcopy(self.config))
                tensors = self.state_dict()
                check_is_its_configuration(self, described, tensors)
                if shares_memory(tensors):  # which transformers knows of head and embedding alone
                    kwargs["state_dict"] = without_sharing({n: x for n, x in tensors.items() if not tied or n != HEAD})
            self._save(save_directory, is_main_process, **kwargs)
        finally:
            self.config.tie_word_embeddings = says

    def _is_tied(self) -> bool | None:
        """Whether head and embedding share their weight; None for a model without a head, or a head without one."""
        weights = [getattr(getattr(self, name, None), "weight", None) for name in ("embedding", "head")]
        return None if any(weight is None for weight in weights) else weights[0] is weights[1]

    def _saved_by_transformers(self) -> bool:
        """Whether it is not the model itself that is written: an adapter's weights, or quantised ones."""
        return bool(getattr(self, "_hf_peft_config_loaded", False)) or getattr(self, "hf_quantizer", None) is not None

    def _save(self, save_directory: str | Path, is_main_process: bool, **kwargs: Any) -> None:
        self.config.auto_map = dict(AUTO_MAP)
        if not is_main_process:  # it takes part in gathering the weights and writes nothing
            super().save_pretrained(save_directory, is_main_process=False, **kwargs)
            return
        with updated_folder(Path(save_directory)) as folder:
            try:
                super().save_pretrained(folder, **kwargs)
            except SafetensorError as e:
                raise UsageError(f"The weights cannot be written to {save_directory}: {e}.") from e
            shutil.copyfile(SOURCE, folder / f"{REMOTE}.py")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' `from_pretrained`, except that every weight has to be there, and no other.

        Where a folder has our manifest, the files that are read here are first checked against it. Files that others
        have added to the folder since do not matter.

        Args:
            ignore_mismatched_sizes: draw the embedding and the head anew if they are of another vocabulary.

        Raises:
            UsageError: a file is not what was written (after a change on purpose: `deltaproduct seal FOLDER`), or
                weights and configuration do not belong together.
        """

        def load(name_or_path: Any, **others: Any) -> tuple[Any, dict[str, Any]]:
            return cls._load(name_or_path, *args, ignore_mismatched_sizes=ignore_mismatched_sizes, **others)

        subfolder = kwargs.get("subfolder") or ""
        is_name = isinstance(pretrained_model_name_or_path, str | os.PathLike)
        if is_name and whole_folder(place := Path(pretrained_model_name_or_path) / subfolder).is_dir():
            moved = kwargs | {"subfolder": ""}  # where a writer of the folder has died between its renames
            model, info = read_whole(
                place,
                lambda folder: load(pretrained_model_name_or_path, **kwargs) if folder == place
                else load(str(folder), **moved),
            )  # fmt: skip
        else:
            model, info = load(pretrained_model_name_or_path, **kwargs)
        return (model, info) if output_loading_info else model

    @classmethod
    def _load(cls, name_or_path: Any, *args: Any, ignore_mismatched_sizes: bool, **kwargs: Any) -> tuple[Any, Any]:
        """`from_pretrained` of a folder that nobody writes meanwhile, with transformers' account of the weights."""
        check_against_manifest(name_or_path, kwargs.get("subfolder"))
        check_stored_size(cls, name_or_path, ignore_mismatched_sizes, kwargs)
        try:
            model, info = super().from_pretrained(
                name_or_path,
                *args,
                ignore_mismatched_sizes=True,  # so that the message is the one below
                output_loading_info=True,
                **kwargs,
            )
        except SafetensorError as e:
            raise UsageError(f"The weights in {name_or_path} are damaged: {e}.") from e
        except pickle.UnpicklingError as e:
            # PyTorch's own message is a page of advice, some of it to run the pickle after all.
            raise UsageError(
                f"The weights in {name_or_path} are a pickle that is damaged, or holds more than "
                "tensors, and were not read."
            ) from e
        mismatched = {name for name, *_ in info["mismatched_keys"]} - (VOCABULARY if ignore_mismatched_sizes else set())
        for names, what in (
            (info["missing_keys"], "is missing"),
            (info["unexpected_keys"], "has no place in this model"),
            (mismatched, "is of another shape"),
        ):
            if names:
                raise UsageError(f"The checkpoint {name_or_path} does not fit its configuration: {min(names)} {what}.")
        return model, info

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: it would have transformers copy this package's source into the folders that it saves."""
