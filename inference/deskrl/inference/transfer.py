"""What deskrl puts into vLLM's worker processes: how new weights get in, and that none outlives the role.

vLLM imports this module there because the engine names `TransferExtension` as its worker extension. Importing it
registers the transfer engine and follows the role's process; nothing else imports it. The transfer engine reads a
safetensors file, and knows nothing of gRPC, versions or caches.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from deskrl.core import lifetime
from deskrl.inference import engine_mends as engine_mends  # mends as it is imported
from deskrl.inference.engine import TRANSFER_BACKEND


@dataclass
class FileInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on beforehand."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """All weights, in one safetensors file with the names of the model's checkpoint."""

    path: str


class FileTransferEngine(WeightTransferEngine[FileInit, FileUpdate]):  # type: ignore[misc]
    """Loads a whole checkpoint layer by layer, as vLLM does at its start.

    The layer-wise reload matters: backends repack weights when they load them and free the originals, so that copying
    into the parameters that one finds would fail (on CPUs) or be wrong (quantised layers).
    """

    init_info_cls = FileInit
    update_info_cls = FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Make the model ready to take a checkpoint again."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdate) -> None:
        """Load every tensor of the file."""
        from safetensors import safe_open

        with safe_open(update_info.path, framework="pt") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def finish_weight_update(self) -> None:
        """Repack what was loaded."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        # A head that is tied to the embedding owns no tensor of a checkpoint, so the reload passes it by: on a CPU it
        # would go on with its packed copy of the old one.
        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead) and isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
                layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Nothing to release."""

    @staticmethod
    def trainer_send_weights(iterator: object, trainer_args: object) -> None:
        """The trainer's half, which vLLM 0.26 wants declared: the learner streams its weights over gRPC instead."""
        raise NotImplementedError


class TransferExtension:
    """Mixed into vLLM's workers so that they import this module."""


WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, FileTransferEngine)
# vLLM's processes would go on for ever if the role's were killed: its engine process waits for requests, not for us.
lifetime.die_with_parent()
