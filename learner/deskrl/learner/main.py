"""Main program of one learner rank: its phases from loading the model to the final results.

Every rank runs this program on the same groups. Rank 0 alone plans groups, publishes weights, commits batches and
writes files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from deskrl.core import ids
from deskrl.core.config import RunConfig
from deskrl.core.metrics_server import serve_metrics
from deskrl.core.process_lifecycle import STOPPED_STATUS, die_with_parent, stop_event
from deskrl.core.step_codec import VersionSpan
from deskrl.learner import cancellation
from deskrl.learner.batch_agreement import BatchDamagedError
from deskrl.learner.batch_builder import GroupBatch
from deskrl.learner.batches.token_stats import write_token_stats
from deskrl.learner.checkpoint.checkpoint_commit import CheckpointCommitter
from deskrl.learner.components import Components, build_components
from deskrl.learner.curriculum import DEMO
from deskrl.learner.demonstration_imitation import imitate_demonstrations
from deskrl.learner.evaluation import Evaluator
from deskrl.learner.grpo import train_on_groups
from deskrl.learner.metrics.metric_records import update_record
from deskrl.learner.metrics.update_stats import UpdateReport
from deskrl.learner.nodes.node_watch import watch_nodes
from deskrl.learner.train_state import PendingCommit, TrainState
from deskrl.learner.warm_start import run_warm_start
from deskrl.learner.weights.manifest import WeightManifest, tensor_specs
from deskrl.learner.weights.replica_watcher import watch_replicas
from deskrl.proto.v1 import common_pb2

_log = logging.getLogger(__name__)


def run(config: RunConfig) -> int:
    """Train as configured, resuming from the newest checkpoint if there is one, and return the exit status.

    SIGTERM cancels the update in progress; the newest checkpoint is kept, and the status is `STOPPED_STATUS`.
    """
    die_with_parent()
    stop = stop_event()
    watch_nodes(config.learner.node_timeout_s, stop)
    components = build_components(config, stop)
    try:
        Learner(config, components).run()
    except cancellation.Stopped:
        _log.info("stopped; the newest checkpoint is kept")
        return STOPPED_STATUS
    except Exception:
        if not stop.is_set():
            raise
        _log.info("stopped during a call to another rank or role", exc_info=True)
        return STOPPED_STATUS
    finally:
        components.close()
    return 0


class Learner:
    """Trains the policy on one rank.

    Args:
        config: run configuration.
        components: components of this rank.
    """

    def __init__(self, config: RunConfig, components: Components) -> None:
        self._config = config
        self._grpo = config.learner.grpo
        self._components = components
        self._metrics = components.metrics
        self._committer = CheckpointCommitter(
            components.checkpoint_writer,
            components.replay,
            is_rank_0=components.is_rank_0,
            groups_per_batch=self._grpo.groups_per_batch,
            num_tasks=components.curriculum.num_tasks,
        )
        self._evaluator = Evaluator(config, components, self._committer)
        self._state = TrainState()

    def run(self) -> None:
        """Run all phases."""
        if self._components.is_rank_0:
            serve_metrics(self._config.security.metrics_host, self._config.learner.metrics_port, "learner.metrics_port")
        self._metrics.write_phase("loading")
        if not self._resume():
            self._warm_start()
            self._committer.begin(self._state, self._version)
        with self._replicas():
            self._metrics.write_phase("publishing")
            self._publish()
            self._announce_version()
            self._evaluator.evaluate("before", self._version, self._staleness)
            self._metrics.write_phase("training")
            while not self._is_trained():
                self._update()
            self._evaluator.evaluate("after", self._version, self._staleness)
        self._committer.poll(wait=True)
        self._update_model_card()
        self._write_results()
        self._metrics.write_phase("finished")

    def _resume(self) -> bool:
        """Load the newest checkpoint and start a new lineage; return False if there is no checkpoint."""
        engine, checkpoints = self._components.engine, self._components.checkpoints
        checkpoint = checkpoints.newest()
        lineages = checkpoints.read_lineages()
        if checkpoint is not None:
            checkpoints.load(checkpoint, engine)
            self._state = TrainState.from_json(checkpoint.state)
            _log.info("resumed from %s after %d updates", checkpoint.path.name, self._state.num_updates)
            self._metrics.write_missing_update(self._state)
        # The broadcast returns after every rank has read the lineages, which rank 0 then writes.
        lineage = engine.broadcast_from_rank_0(ids.new_id("lineage"))
        self._lineages = lineages.fork(lineage, self._state.lineage, self._state.num_updates)
        self._state.lineage = lineage
        if self._components.is_rank_0:
            checkpoints.write_lineages(self._lineages)
        self._committer.commit(self._state.pending, self._version)
        return checkpoint is not None

    def _warm_start(self) -> None:
        """Train on demonstrations, if configured."""
        warm_start = self._config.learner.warm_start
        if warm_start is None:
            return
        if warm_start.demonstrations is not None:
            imitate_demonstrations(self._components, self._config, warm_start)
            return
        run_warm_start(self._components, self._config, warm_start)
        self._state.pending.append(PendingCommit(DEMO, DEMO, []))

    @contextmanager
    def _replicas(self) -> Iterator[None]:
        """Wait for inference replicas, and follow replicas that join or leave within the context."""
        self._metrics.write_phase("waiting for inference")
        if not self._components.is_rank_0:
            yield
            return
        publisher = self._components.publisher
        with watch_replicas(publisher.refresh_members, publisher.replicas.check_for_restarts):
            publisher.wait_for_replicas()
            yield

    def _update(self) -> None:
        """Build a batch, train on it, publish the weights and start a checkpoint."""
        components, state, seconds = self._components, self._state, dict[str, float]()
        batch, report = self._train(seconds)
        if report is None:
            _log.warning("batch %s has nothing to train on; no optimizer step was taken", batch.batch_id)
        state.num_updates += 1
        with _timed(seconds, "publish"):
            self._publish()
        status = components.replay.status() if components.is_rank_0 else None
        num_tasks = components.curriculum.num_tasks
        record = update_record(batch, report, state.num_updates, self._config, num_tasks, status)
        if components.is_rank_0 and report is not None:
            num_kept = self._config.learner.keep_token_stats
            write_token_stats(components.folder, batch.batch_id, report.token_stats, num_kept)
        state.add_counts(record["per_task"])
        state.history.append(record)
        state.pending.append(batch.pending_commit())
        with _timed(seconds, "checkpoint"):
            if self._is_checkpoint_due():
                self._committer.begin(state, self._version)
        self._announce_version()
        self._metrics.write_update(record, seconds)
        self._write_results()

    def _train(self, seconds: dict[str, float]) -> tuple[GroupBatch, UpdateReport | None]:
        """Build a batch and train on it, again if episodes of it were damaged; add the durations to `seconds`."""
        components, state = self._components, self._state
        while True:
            with _timed(seconds, "wait"):
                batch = components.batch_builder.build(state, self._staleness)
            self._committer.poll()
            try:
                with _timed(seconds, "learn"):
                    report = train_on_groups(
                        components.engine,
                        components.loader,
                        batch.kept,
                        self._staleness,
                        self._grpo,
                        self._config.seed,
                        state.num_updates,
                        components.reference,
                    )
            except BatchDamagedError:
                state.num_taken -= len(batch.groups)
                continue
            return batch, report

    def _publish(self) -> None:
        """Publish the current weights to all replicas."""
        engine, publisher = self._components.engine, self._components.publisher
        manifest = WeightManifest(
            version=self._version,
            specs=tensor_specs(engine.checkpoint_parameters()),
            canary=self._components.canary.canary,
            canary_logprobs=self._components.canary.score(engine),
            processor_hash=self._components.processor_hash,
        )
        publisher.publish(manifest, engine)
        self._metrics.write_published(self._version, publisher.replicas.num_quarantined())

    def _announce_version(self) -> None:
        """Report the acting policy version to the replay service, which then admits more rollouts."""
        if self._components.is_rank_0:
            self._components.replay.set_policy_version(self._version, self._state.num_updates)

    def _update_model_card(self) -> None:
        """Write the card of the newest checkpoint again, with the evaluation after training."""
        components = self._components
        if components.is_rank_0 and (newest := components.checkpoints.list_all()):
            components.model_card.write(newest[-1].path, self._state.to_json())

    def _write_results(self) -> None:
        if self._components.is_rank_0:
            self._metrics.write_results(self._state, self._components.replay.status())

    @property
    def _version(self) -> common_pb2.PolicyVersion:
        return common_pb2.PolicyVersion(lineage=self._state.lineage, step=self._state.num_updates)

    def _staleness(self, span: VersionSpan) -> int | None:
        return self._lineages.distance(span.lineage, span.step, self._state.num_updates)

    def _is_trained(self) -> bool:
        """Return whether the configured number of updates or environment steps is reached."""
        max_env_steps = self._grpo.max_env_steps
        has_env_steps = 0 < max_env_steps <= self._state.num_env_steps()
        return has_env_steps or self._state.num_updates >= self._grpo.num_updates

    def _is_checkpoint_due(self) -> bool:
        return self._state.num_updates % self._config.learner.checkpoint_every == 0 or self._is_trained()


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the duration of the context."""
    started_s = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - started_s, 3)
