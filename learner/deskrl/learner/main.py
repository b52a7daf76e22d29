"""The learner, one rank of it: its phases from the first load to the last result, readable from top to bottom.

Every rank runs this same program on the same groups; rank 0 alone plans, publishes, commits and writes files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from deskrl.core import ids
from deskrl.core.config import RunConfig
from deskrl.core.exposition import expose
from deskrl.core.lifetime import die_with_parent, stop_event
from deskrl.core.runfolder import RunFolder
from deskrl.core.scores import write_scores
from deskrl.core.trajectory import Span
from deskrl.learner import grpo, metrics, stopping
from deskrl.learner.evaluation import evaluation_record, mismatch_rows, of_one_version
from deskrl.learner.imitation import demonstration, image_sizes, imitate
from deskrl.learner.parts import Parts, assemble
from deskrl.learner.plan import DEMO, TRAIN, eval_queue
from deskrl.learner.records import add_counts, pending_commit, update_record, weights_record
from deskrl.learner.saving import Saving
from deskrl.learner.state import LearnerState, PendingCommit
from deskrl.learner.take import TakenBatch
from deskrl.learner.trajectories import TaskGroup, Trajectory, decode_group
from deskrl.learner.weights.announcements import Announcement, Outcome, describe
from deskrl.learner.weights.following import following_replicas
from deskrl.proto.v1 import common_pb2, replay_pb2

_log = logging.getLogger("deskrl.learner")


def run(config: RunConfig) -> int:
    """Train as the configuration says, from the newest checkpoint if there is one; the exit status.

    SIGTERM abandons the update under way: the newest checkpoint stands, and the status is 0.
    """
    die_with_parent()
    stop = stop_event()
    folder = RunFolder(config.folder)
    parts = assemble(config, stop, lambda outcome: _note_outcome(folder, outcome))
    try:
        Learner(config, parts).run()
    except stopping.Stopped:
        _log.info("stopped; the newest checkpoint stands")
    except Exception:
        if not stop.is_set():
            raise
        _log.info("stopped in the middle of a call to another rank or role", exc_info=True)
    finally:
        parts.close()
    return 0


class Learner:
    """One rank.

    Args:
        config: of the run.
        parts: what it works with.
    """

    def __init__(self, config: RunConfig, parts: Parts) -> None:
        self._config = config
        self._grpo = config.learner.grpo
        self._parts = parts
        self._is_first = parts.engine.rank == 0
        self._saving = Saving(parts, config.learner.grpo.groups_per_batch)
        self._state = LearnerState()

    def run(self) -> None:
        """All phases."""
        if self._is_first:
            expose(self._config.security.metrics_host, self._config.learner.metrics_port, "learner.metrics_port")
        self._phase("loading")
        if not self._restore():
            self._warm_start()
            self._saving.begin(self._state, self._version)
        with self._replicas():
            self._phase("publishing")
            self._publish()
            self._announce_version()
            self._evaluate("before")
            self._phase("training")
            while not self._is_trained():
                self._update()
            self._evaluate("after")
        self._saving.look(wait=True)
        self._write_results()
        self._phase("finished")

    # The phases.

    @contextmanager
    def _replicas(self) -> Iterator[None]:
        """Within it there are replicas to publish to, and whoever joins is followed."""
        self._phase("waiting for inference")
        if not self._is_first:
            yield
            return
        replay, publisher = self._parts.replay, self._parts.publisher
        with following_replicas(replay.joined_replicas, publisher.set_joined, publisher.look_again):
            publisher.wait_for_replicas()
            yield

    def _restore(self) -> bool:
        """Go on from the newest checkpoint, under a lineage of its own; False if there is none."""
        engine, checkpoints = self._parts.engine, self._parts.checkpoints
        checkpoint = checkpoints.newest()
        tree = checkpoints.read_lineages()
        if checkpoint is not None:
            checkpoints.load(checkpoint, engine)
            self._state = LearnerState.from_json(checkpoint.state)
            _log.info("resumed from %s after %d updates", checkpoint.path.name, self._state.num_updates)
            self._write_missing_line()
        lineage = engine.from_rank_0(ids.new_id("lineage"))  # by now every rank has read the tree
        self._tree = tree.branch_off(lineage, self._state.lineage, self._state.num_updates)
        self._state.lineage = lineage
        if self._is_first:
            checkpoints.write_lineages(self._tree)
        self._saving.commit(self._state.pending, self._version)
        return checkpoint is not None

    def _warm_start(self) -> None:
        """Imitate the tasks' scripted solutions."""
        warm_start = self._config.learner.warm_start
        if warm_start is None:
            return
        self._phase("demonstrations")
        demos = self._take_demonstrations()
        self._phase("imitation")
        temperature, seed = self._grpo.temperature, self._config.seed
        likelihood = 0.0
        for report in imitate(self._parts.engine, self._parts.feed, demos, warm_start, temperature, seed):
            if report.likelihoods is not None:
                likelihood = min(report.likelihoods.values())
                self._append_metrics("imitation", likelihood=likelihood, **asdict(report))
        if likelihood < warm_start.stop_likelihood:
            _log.warning("imitation ended at likelihood %.3f, below %.3f", likelihood, warm_start.stop_likelihood)

    def _evaluate(self, when: str) -> None:
        """Fresh sampled episodes under the present weights, which stay in place until all are played."""
        if self._config.learner.eval.episodes == 0:
            return
        queue = eval_queue(when)
        if when not in self._parts.results.evaluations():
            self._phase(queue)
            played = self._take_all(queue, self._parts.curriculum.eval_groups(when))
            for group in played:
                self._parts.taker.check_processor(group)
            groups, num_other = of_one_version(played, self._distance)
            if num_other:
                _log.error("%s: %d episodes do not count: another version acted in them", queue, num_other)
            rows, temperature = mismatch_rows(groups), self._grpo.temperature
            mismatch = grpo.measure_mismatch(self._parts.engine, self._parts.feed, rows, temperature)
            record = evaluation_record(groups, num_other, self._config.replay.success_above, mismatch)
            self._saving.look(wait=True)  # what was evaluated is what a learner that is started again goes on from
            if self._is_first:
                self._parts.results.add_evaluation(when, record)
                metrics.note_evaluation(record)
            self._append_metrics("eval", when=when, version=self._state.num_updates, **record)
        if self._is_first:
            self._parts.replay.commit(queue, queue, [], self._version)

    def _update(self) -> None:
        """One update: take a batch, learn it, publish, begin a checkpoint."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "wait"):
            batch = self._parts.taker.take(self._state, self._distance)
        self._saving.look()
        with _timed(seconds, "learn"):
            report = self._learn(batch)
        self._state.num_updates += 1
        with _timed(seconds, "publish"):
            self._publish()
        record = self._note_update(batch, report)
        with _timed(seconds, "checkpoint"):
            if self._is_checkpoint_due():
                self._saving.begin(self._state, self._version)
        self._announce_version()
        self._append_metrics("update", **record, seconds=seconds)
        if self._is_first:
            metrics.note_update(record, seconds, self._parts.applications)
        self._write_results()

    # What the phases are made of.

    @property
    def _version(self) -> common_pb2.PolicyVersion:
        return common_pb2.PolicyVersion(lineage=self._state.lineage, step=self._state.num_updates)

    def _distance(self, span: Span) -> int | None:
        return self._tree.distance(span.lineage, span.step, self._state.num_updates)

    def _learn(self, batch: TakenBatch) -> grpo.UpdateReport | None:
        """One batch; None if no group of it tells good from bad."""
        report = learn_batch(self._parts, batch, self._distance, self._config, self._state.num_updates)
        if report is None:
            _log.warning("batch %s has nothing to learn from: no optimizer step", batch.batch_id)
        return report

    def _publish(self) -> None:
        """Bring the present weights to every replica."""
        engine, publisher = self._parts.engine, self._parts.publisher
        announcement = Announcement(
            version=self._version,
            specs=describe(engine.checkpoint_parameters()),
            canary=self._parts.canary.canary,
            canary_logprobs=self._parts.canary.score(engine),
            processor_hash=self._parts.processor_hash,
        )
        publisher.publish(announcement, engine)
        if self._is_first:
            metrics.POLICY_STEP.set(self._version.step)
            metrics.QUARANTINED.set(publisher.num_quarantined())

    def _announce_version(self) -> None:
        """Tell replay which version acts: acting may go on this much further."""
        if self._is_first:
            self._parts.replay.set_policy_version(self._version, self._state.num_updates)

    def _is_trained(self) -> bool:
        """Whether the reinforcement-learning phase is over: updates or environment steps are used up."""
        budget = self._grpo.env_steps
        return self._state.num_updates >= self._grpo.num_updates or 0 < budget <= self._state.num_env_steps()

    def _is_checkpoint_due(self) -> bool:
        return self._state.num_updates % self._config.learner.checkpoint_every == 0 or self._is_trained()

    def _take_demonstrations(self) -> list[Trajectory]:
        """Scripted episodes that succeeded, with the ids that the policy has to learn to sample."""
        groups = self._take_all(DEMO, self._parts.curriculum.demo_groups())
        self._state.pending.append(PendingCommit(DEMO, DEMO, []))
        demos = []
        for group in groups:
            solved = [member for member in group.members if member.reward > self._config.replay.success_above]
            if not solved:
                raise RuntimeError(f"no demonstration of task {group.task_id} succeeded: mend the task or its script")
            if len(solved) < len(group.members) or group.num_faulted:
                _log.warning("task %s: %d of its demonstrations are of use", group.task_id, len(solved))
            demos += solved
        sizes = image_sizes(
            self._parts.replay.fetch_images({name for demo in demos for step in demo.steps for name in step.images})
        )
        return [demonstration(demo, self._parts.tokenizer, self._parts.sizing, sizes) for demo in demos]

    def _take_all(self, queue: str, plans: Sequence[replay_pb2.GroupPlan]) -> list[TaskGroup]:
        """Plan groups on a queue of their own and wait for all of them."""
        if self._is_first:
            self._parts.replay.plan(plans)
        messages = self._parts.replay.take_groups(
            queue, queue, range(len(plans)), dropped=list, while_waiting=lambda: None
        )
        return [decode_group(message) for message in messages]

    # What is written down.

    def _note_update(self, batch: TakenBatch, report: grpo.UpdateReport | None) -> dict[str, Any]:
        status = self._parts.replay.status() if self._is_first else None
        num_tasks = self._parts.curriculum.num_tasks
        record = update_record(batch, report, self._state.num_updates, self._config, num_tasks, status)
        if self._is_first and report is not None:
            write_scores(self._parts.folder, batch.batch_id, report.token_scores, self._config.learner.keep_scores)
        add_counts(self._state, record["per_task"])
        self._state.history.append(record)
        self._state.pending.append(pending_commit(TRAIN, batch))
        return record

    def _write_results(self) -> None:
        if not self._is_first:
            return
        status = self._parts.replay.status()
        self._parts.results.write(self._state.history, self._state.per_task, status)
        stored = {success.task_id: success.num_stored for success in status.successes}
        used = {success.task_id: success.num_used for success in status.successes}
        self._append_metrics("replay", stored=stored, used=used)

    def _write_missing_line(self) -> None:
        """Of the newest update, where the last learner was killed between its checkpoint and the line."""
        written = {line["update"] for line in self._parts.folder.read_metrics("update")}
        for record in self._state.history[-1:]:
            if record["update"] not in written:
                self._append_metrics("update", **record, seconds={})  # how long its parts took, nobody knows

    def _phase(self, name: str) -> None:
        _log.info("phase: %s", name)
        self._append_metrics("phase", phase=name)

    def _append_metrics(self, kind: str, **values: Any) -> None:
        if self._parts.tracker is not None:
            self._parts.folder.append_metrics(kind, **values)
            self._parts.tracker.log(kind, values)


def _note_outcome(folder: RunFolder, outcome: Outcome) -> None:
    """Write down an update of a replica; called from the publisher's threads."""
    record = weights_record(outcome)
    folder.append_metrics("weights", **record)
    metrics.note_weights(record)


def learn_batch(
    parts: Parts,
    batch: TakenBatch,
    distance: Callable[[Span], int | None],
    config: RunConfig,
    num_updates: int,
) -> grpo.UpdateReport | None:
    """Learn what was taken; None, and no change, if no group of it tells good from bad.

    Args:
        parts: of the rank that learns.
        batch: with what became of each group.
        distance: versions between a span's policy and the one that learns.
        config: of the run.
        num_updates: batches that were learnt before.
    """
    grpo_config = config.learner.grpo
    shuffle_seed = config.seed if grpo_config.shuffle_rewards else None
    learnable = grpo.prepare(batch.kept, distance, grpo_config, shuffle_seed)
    return grpo.learn(parts.engine, parts.feed, learnable, grpo_config, num_updates) if learnable.rows else None


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started_s = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started_s, 3)
