"""Models whose item and feature vectors live in dynamic tables: loading, saving and pushing them as one thing."""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.distributed as dist
from grzoo.embeddings import DynamicEmbeddingCollection
from grzoo.embeddings.files import obey_umask
from grzoo.embeddings.io import (
    INDEX_NAME,
    load_tables,
    map_tables,
    read_index,
    remove_index,
    save_tables,
    shard_files,
)
from huggingface_hub import HfApi
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, cached_files, extract_commit_hash

from .auto import SharedGroup

_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


class GenRecPreTrainedModel(PreTrainedModel):
    """Base of the zoo's models: a transformers model plus a `DynamicEmbeddingCollection`.

    The backbone registers the collection as its child `embedding_collection`; it holds no parameters, so
    `state_dict()`, `.to()`, ZeRO and optimizers of dense parameters do not see it, while `save_pretrained`,
    `from_pretrained` and `push_to_hub` carry its tables. The config says which tables there are
    (`embedding_tables()`, `embedding_features()`) and what a sample costs (`flops`).
    """

    supports_gradient_checkpointing = True
    main_input_name = "input_ids"
    base_model_prefix = "model"
    embedding_collection: DynamicEmbeddingCollection
    attention_functions: ClassVar[Mapping[str, Callable[..., Tensor]]] = {}  # by `attn_implementation`
    input_module: ClassVar[str]  # of the backbone: its output enters what the first layer reads

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        name = attn_implementation or "auto"
        if name not in (choices := list(self.attention_functions) or ["auto"]):
            raise ValueError(
                f"attn_implementation={name!r} is not available for {type(self).__name__}; choose from {choices}."
            )
        return name

    def enable_input_require_grads(self) -> None:
        """Have what the first layer reads require gradients though all before it is frozen: for adapters and reentrant
        checkpoints. transformers looks for input embeddings to hook, and rows come from tables.
        """

        def require(module: nn.Module, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            for tokens in (output,) if isinstance(output, Tensor) else output:
                tokens.requires_grad_(True)

        self.disable_input_require_grads()
        module = self.base_model.get_submodule(self.input_module)
        self._require_grads_hooks = [module.register_forward_hook(require)]

    def new_embeddings(self, backend: str) -> DynamicEmbeddingCollection:
        """The tables that the config describes, without rows, for a backbone to keep as `embedding_collection`."""
        return DynamicEmbeddingCollection(
            self.config.embedding_tables(),
            self.config.embedding_features(),
            seed=self.config.embedding_seed,
            backend=backend,
        )

    @property
    def embeddings(self) -> DynamicEmbeddingCollection:
        """The tables of the model."""
        collection = self.base_model.embedding_collection
        assert isinstance(collection, DynamicEmbeddingCollection)
        return collection

    @abstractmethod
    def embedding_ids(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Which ids a micro-batch looks up, int64 by feature: no padding, no masked label.

        `collection.prepare([model.embedding_ids(batch), ...]).fetch()[k]` is what `forward` takes as `embeddings`.
        """

    def flops(self, lengths: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Floating-point operations of a forward pass per sample, see the config's `flops`."""
        result: NDArray[np.float64] = self.config.flops(lengths)
        return result

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode without gradients, whatever the mode is outside: no dropout, no row inserted.

        Afterwards every module has the mode that it had before, also one that was frozen by its own `eval()`.
        """
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training

    def save_pretrained(  # type: ignore[override]  # the rest of the arguments is passed on
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        row_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write config, dense weights and tables into a folder that `from_pretrained` reads.

        When the tables are sharded over a process group every rank must call this with the same folder, which all of
        them can reach: each writes its rows, the first also the rest. Otherwise the main process writes everything.

        Args:
            save_directory: a folder; made when missing.
            is_main_process: whether this process writes, when tables are not sharded.
            state_dict: dense weights, when they have to be collected from elsewhere (ZeRO stage 3).
            push_to_hub: upload the whole folder afterwards, to `repo_id` (default: the folder's name).
            row_dtype: of the rows in the files, "float32" or "bfloat16"; default: that of the tables.
            kwargs: as in `transformers.PreTrainedModel.save_pretrained`; `repo_id`, `private`, `token`, `revision`,
                `commit_message`, `create_pr` for the upload.

        Raises:
            RuntimeError: on every rank, when the dense weights could not be written.
        """
        hub = {
            name: kwargs.pop(name, None) for name in ("repo_id", "private", "revision", "commit_message", "create_pr")
        }
        group = self.embeddings.process_group
        if group is not None:
            is_main_process = dist.get_rank(group) == 0
        error: Exception | None = None
        if is_main_process or group is None:
            try:
                if is_main_process:
                    remove_index(save_directory)
                super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
                for file in Path(save_directory).glob("model*.safetensors"):
                    obey_umask(file)
            except Exception as failure:
                error = failure
        _agree(error, group)
        if is_main_process or group is not None:
            save_tables(self.embeddings, save_directory, state=False, row_dtype=row_dtype)
        if push_to_hub and is_main_process:
            _upload(save_directory, token=kwargs.get("token"), **hub)
        if group is not None:
            dist.barrier(group)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """Save into a temporary folder and upload it, tables included; arguments as in transformers.

        Raises:
            ValueError: when the tables are sharded over several ranks, which share no temporary folder.
        """
        group = self.embeddings.process_group
        if group is not None and dist.get_world_size(group) > 1:
            raise ValueError(
                "push_to_hub needs all tables in one process, and these are sharded over "
                f"{dist.get_world_size(group)} ranks: call save_pretrained(folder, push_to_hub=True, repo_id=...) on "
                "every rank with a shared folder."
            )
        url: str = super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]
        return url

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        process_group: dist.ProcessGroup | SharedGroup | None = None,
        trainable: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load config, dense weights and tables from a folder or the hub, all of one revision.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            process_group: shard the tables over its ranks: each rank calls this and reads the rows that it owns.
                Without one, this process maps the tables into memory, read-only: any size opens at once.
            trainable: read the tables into memory, where they can be trained and grow.
            kwargs: as in `transformers.PreTrainedModel.from_pretrained`; what is left over goes to the model's
                constructor (`embedding_backend`).

        Raises:
            OSError: when there is no such model, or it holds no tables.
        """
        output_loading_info = kwargs.get("output_loading_info", False)
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
        if not os.path.isdir(pretrained_model_name_or_path):
            kwargs["revision"] = hub["revision"] = _commit(pretrained_model_name_or_path, hub)
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError("use_safetensors=False asks for weights in a pickle, and grzoo opens none: leave it out")
        try:
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            message = f"the dense weights of {pretrained_model_name_or_path} are damaged: {error}"
            raise OSError(message) from error
        model = loaded[0] if output_loading_info else loaded
        if isinstance(process_group, SharedGroup):
            process_group = process_group.group
        if process_group is not None:
            model.embeddings.set_process_group(process_group)
        folder = _table_folder(pretrained_model_name_or_path, hub)
        if trainable or process_group is not None:
            load_tables(model.embeddings, folder, state=False)
        else:
            map_tables(model.embeddings, folder)
        return loaded


def _commit(name: str | os.PathLike[str], hub: dict[str, Any]) -> str:
    """The commit that a revision of a hub repository points to now, so that all files are taken from it."""
    config = cached_file(name, CONFIG_NAME, **hub)
    commit: str = extract_commit_hash(config, None) or hub.get("revision", "main")
    return commit


def _table_folder(name_or_path: str | os.PathLike[str], hub: dict[str, Any]) -> Path:
    """The local folder that holds the index of the tables and all their shards, downloaded if need be."""
    try:
        index = cached_files(name_or_path, [INDEX_NAME], **hub)
    except OSError as error:
        raise OSError(
            f"{name_or_path} has no {INDEX_NAME}: the tables of the model are missing, and its dense weights are of no "
            "use without them. Save the model with its own save_pretrained."
        ) from error
    assert index
    folder = Path(index[0]).parent
    shards = shard_files(read_index(folder))
    if shards:
        cached_files(name_or_path, shards, **hub)
    return folder


def _upload(
    folder: str | os.PathLike[str], *, token: Any, repo_id: str | None, private: bool | None, **commit: Any
) -> None:
    api = HfApi(token=token)
    commit["create_pr"] = bool(commit["create_pr"])
    repo_id = api.create_repo(repo_id or Path(folder).resolve().name, private=private, exist_ok=True).repo_id
    if commit["revision"] is not None and not commit["revision"].startswith("refs/pr"):
        api.create_branch(repo_id, branch=commit["revision"], exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=os.fspath(folder), **commit)


def _agree(error: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank when one has an error, so that none waits in the next collective."""
    if group is not None:
        device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
        failed = torch.tensor([float(error is not None)], device=device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
        if error is None and failed.item():
            raise RuntimeError("Another rank could not write the dense weights; see its message.")
    if error is not None:
        raise error
