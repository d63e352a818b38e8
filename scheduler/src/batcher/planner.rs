//! The writing of one step: decodes, then prompts, then new sequences, while tokens and blocks last.
//!
//! Why it always goes on: the sequence of the best rank can take the blocks of all others, and alone it
//! fits, so each step that has work computes at least one token of it. Why it ends: ranks of one
//! priority are tickets, which preemption does not change.

use std::cmp::Reverse;

use cache::{BlockId, Lookup};
use protocol::{Instant, SequenceId, TenantId};

use super::sequence::{Phase, Rank, Sequence};
use super::{Batcher, BatcherOutput};
use crate::{SequenceStep, StepPlan};

/// The step being written.
struct Draft {
    /// Tokens that may still be added.
    budget: usize,
    /// Blocks that prompts already admitted will still take.
    reserved: usize,
    /// New sequences of a lower priority than this must wait for the next step.
    floor: i16,
}

enum Chunk {
    /// Tokens added.
    Planned(usize),
    /// No block, or the sequence's share of the step is used up.
    Full,
}

enum Admission {
    Admitted,
    /// Another sequence computes its next block.
    Awaits,
    NoRoom,
}

enum Visit {
    /// The lane's turn is over.
    Done { planned: bool },
    /// Tokens or room ended before the turn did.
    Interrupted { planned: bool },
}

impl Batcher {
    /// The next step, or `None` if nothing can be computed. Requires that no step is in flight.
    pub(super) fn plan(&mut self, now: Instant, out: &mut Vec<BatcherOutput>) -> Option<StepPlan> {
        assert!(self.in_flight.is_empty(), "one step at a time");
        self.step += 1;
        let mut draft =
            Draft { budget: self.config.tokens_per_step_max, reserved: 0, floor: i16::MIN };
        self.plan_decodes(&mut draft, out);
        let decodes = draft.budget < self.config.tokens_per_step_max;
        if let Some(target) = self.config.step_time_target.filter(|_| decodes) {
            draft.budget = draft.budget.min(self.pace.prompt_tokens_within(target));
        }
        draft.reserved = self.blocks_reserved();
        let mut priority = self.lanes.next_priority(None);
        while let Some(level) = priority {
            self.plan_level(level, &mut draft, out);
            priority = self.lanes.next_priority(Some(level));
        }
        self.write_plan(now)
    }

    fn plan_decodes(&mut self, draft: &mut Draft, out: &mut Vec<BatcherOutput>) {
        let decodes: Vec<SequenceId> = self.running.values().copied().collect();
        for id in decodes {
            let sequence = &self.sequences[&id];
            if sequence.phase != Phase::Decode {
                continue;
            }
            assert_eq!(sequence.computed + 1, sequence.tokens.len(), "one token is uncomputed");
            if self.grow(id, 1, draft, out) == 1 {
                self.sequence_mut(id).planned = 1;
                draft.budget -= 1;
            }
        }
    }

    /// Deficit round robin between the tenants of one priority.
    fn plan_level(&mut self, priority: i8, draft: &mut Draft, out: &mut Vec<BatcherOutput>) {
        let mut kept: Option<TenantId> = None;
        let mut in_vain = 0;
        while let Some(level) = self.lanes.level(priority) {
            if draft.budget == 0 || in_vain >= level.tenants() {
                break;
            }
            let Some(tenant) = level.turn() else { break };
            let visit = self.visit_lane(priority, &tenant, draft, out);
            let Some(level) = self.lanes.level(priority) else { break };
            let (Visit::Done { planned } | Visit::Interrupted { planned }) = visit;
            in_vain = if planned { 0 } else { in_vain + 1 };
            level.pass(&tenant);
            if matches!(visit, Visit::Interrupted { .. }) && kept.is_none() {
                kept = Some(tenant);
            }
        }
        if let (Some(tenant), Some(level)) = (kept, self.lanes.level(priority)) {
            level.keep(tenant);
        }
    }

    fn visit_lane(
        &mut self,
        priority: i8,
        tenant: &TenantId,
        draft: &mut Draft,
        out: &mut Vec<BatcherOutput>,
    ) -> Visit {
        let mut planned = false;
        let (step, quantum) = (self.step, self.config.tenant_quantum_tokens);
        if let Some(lane) = self.lanes.lane(priority, tenant) {
            lane.begin(step);
            if lane.deficit == 0 {
                lane.deficit = quantum;
            }
        }
        while let Some(lane) = self.lanes.lane(priority, tenant) {
            if lane.deficit == 0 {
                return Visit::Done { planned };
            }
            if draft.budget == 0 {
                return Visit::Interrupted { planned };
            }
            if let Some((ticket, id)) = lane.next_prefilling() {
                let deficit = lane.deficit;
                let chunk = self.plan_chunk(id, deficit, draft, out);
                let Some(lane) = self.lanes.lane(priority, tenant) else { break };
                match chunk {
                    Chunk::Planned(tokens) => {
                        planned = true;
                        lane.deficit -= tokens;
                    }
                    Chunk::Full => lane.prefilling_from = ticket + 1,
                }
                continue;
            }
            let Some((ticket, id)) = lane.next_waiting() else {
                lane.deficit = 0;
                break;
            };
            match self.admit(id, draft, out) {
                Admission::Admitted => {}
                Admission::Awaits => {
                    if let Some(lane) = self.lanes.lane(priority, tenant) {
                        lane.waiting_from = ticket + 1;
                    }
                }
                Admission::NoRoom => {
                    draft.floor = i16::MAX;
                    return Visit::Interrupted { planned };
                }
            }
        }
        Visit::Done { planned }
    }

    /// Adds prompt tokens of a running sequence to the step.
    fn plan_chunk(
        &mut self,
        id: SequenceId,
        deficit: usize,
        draft: &mut Draft,
        out: &mut Vec<BatcherOutput>,
    ) -> Chunk {
        let sequence = &self.sequences[&id];
        let left = sequence.tokens.len() - sequence.computed - sequence.planned;
        let share = self.config.prefill_chunk_max - sequence.planned;
        let wanted = left.min(share).min(deficit).min(draft.budget);
        if wanted == 0 {
            return Chunk::Full;
        }
        let blocks_before = sequence.blocks.len();
        let tokens = self.grow(id, wanted, draft, out);
        let sequence = self.sequence_mut(id);
        draft.reserved = draft.reserved.saturating_sub(sequence.blocks.len() - blocks_before);
        if tokens == 0 {
            return Chunk::Full;
        }
        sequence.planned += tokens;
        draft.budget -= tokens;
        Chunk::Planned(tokens)
    }

    /// Gets blocks for up to `tokens` more of a running sequence, from sequences of a worse rank if
    /// none is left; says how many tokens fit.
    fn grow(
        &mut self,
        id: SequenceId,
        tokens: usize,
        draft: &mut Draft,
        out: &mut Vec<BatcherOutput>,
    ) -> usize {
        let block_tokens = self.config.block_tokens;
        let sequence = &self.sequences[&id];
        let (rank, start) = (sequence.rank(), sequence.computed + sequence.planned);
        let mut places = sequence.blocks.len() * block_tokens;
        while places < start + tokens {
            let Some(allocated) = self.pool.allocate() else {
                if self.preempt_below(rank, draft, out) {
                    draft.floor = i16::MAX;
                    continue;
                }
                break;
            };
            self.sequence_mut(id).blocks.push(allocated.block);
            places += block_tokens;
        }
        places.min(start + tokens) - start
    }

    /// Gives a waiting sequence its cached blocks and a place among the running, if the rest of its
    /// prompt fits too.
    fn admit(
        &mut self,
        id: SequenceId,
        draft: &mut Draft,
        out: &mut Vec<BatcherOutput>,
    ) -> Admission {
        if i16::from(self.sequences[&id].priority) < draft.floor {
            return Admission::NoRoom;
        }
        let Some(ready) = self.ready_blocks(id) else { return Admission::Awaits };
        let sequence = self.sequences.get_mut(&id).expect("waiting sequences exist");
        let hashes = sequence.chain.as_ref().map_or(&[][..], |chain| &chain.hashes()[..ready]);
        sequence.blocks = self.pool.match_prefix(hashes);
        assert_eq!(sequence.blocks.len(), ready, "nothing was evicted since it was looked at");
        let need = sequence.tokens.len().div_ceil(self.config.block_tokens) - ready;
        if !self.make_room(id, need, draft, out) {
            let sequence = self.sequences.get_mut(&id).expect("waiting sequences exist");
            sequence.release(&mut self.pool);
            return Admission::NoRoom;
        }
        let sequence = self.sequences.get_mut(&id).expect("waiting sequences exist");
        sequence.phase = Phase::Prefill;
        sequence.computed = ready * self.config.block_tokens;
        sequence.committed = ready;
        sequence.claim(&mut self.pool);
        self.lanes.move_from(sequence, Phase::Waiting, sequence.priority);
        self.running.insert(sequence.rank(), id);
        draft.reserved += need;
        let cached_tokens = sequence.computed;
        if sequence.started {
            out.push(BatcherOutput::Resumed { sequence: id, cached_tokens });
        } else {
            sequence.started = true;
            self.stats.prompt_tokens += sequence.prompt_tokens as u64;
            self.stats.prefix_hit_tokens += cached_tokens as u64;
            let tenant = sequence.tenant.clone();
            self.leave_queue(&tenant);
            out.push(BatcherOutput::Started { sequence: id, cached_tokens });
        }
        Admission::Admitted
    }

    /// How many blocks of a waiting sequence the cache has, or `None` if it is better to wait because
    /// another sequence computes the next one. That one then gets this one's priority.
    fn ready_blocks(&mut self, id: SequenceId) -> Option<usize> {
        let sequence = self.sequences.get_mut(&id).expect("waiting sequences exist");
        let reusable = sequence.reusable_blocks(self.config.block_tokens);
        let Some(chain) = &sequence.chain else { return Some(0) };
        // The first look starts where the last one ended: what was pending there mostly still is. The
        // second one finds what was evicted meanwhile.
        for from in [sequence.ready_hint, 0] {
            let mut at = from;
            let owner = loop {
                if at == reusable {
                    break None;
                }
                match self.pool.lookup(&chain.hashes()[at]) {
                    Lookup::Ready(_) => at += 1,
                    Lookup::Pending(owner) => break Some(owner),
                    Lookup::Absent => break None,
                }
            };
            if from == 0 {
                sequence.ready_hint = at;
            }
            if let Some(owner) = owner {
                sequence.ready_hint = at;
                let priority = sequence.priority;
                self.raise(owner, priority);
                return None;
            }
        }
        Some(sequence.ready_hint)
    }

    /// Whether `need` more blocks and a place can be given to the waiting sequence `id`, whose cached
    /// blocks are held already; takes them from sequences of a lower priority where that is enough.
    fn make_room(
        &mut self,
        id: SequenceId,
        need: usize,
        draft: &mut Draft,
        out: &mut Vec<BatcherOutput>,
    ) -> bool {
        let priority = self.sequences[&id].priority;
        let mut must_preempt = false;
        loop {
            let watermark =
                if self.running.is_empty() { 0 } else { self.config.blocks_watermark as usize };
            let enough = self.pool.available() >= need + draft.reserved + watermark;
            if enough && self.running.len() < self.config.sequences_max {
                return true;
            }
            if !must_preempt && !self.lower_suffice(priority, need, draft) {
                return false;
            }
            must_preempt = true;
            // Worse than the last of this priority: of a lower one.
            if !self.preempt_below((Reverse(priority), u64::MAX), draft, out) {
                return false;
            }
            draft.floor = draft.floor.max(i16::from(priority));
        }
    }

    /// Whether preempting every sequence below `priority` would make room.
    fn lower_suffice(&self, priority: i8, need: usize, draft: &Draft) -> bool {
        let (mut blocks, mut reserved, mut places) = (0, 0, 0);
        for (rank, id) in self.running.iter().rev() {
            if rank.0.0 >= priority {
                break;
            }
            let sequence = &self.sequences[id];
            let own = |b: &&BlockId| self.pool.references(**b) == 1;
            blocks += sequence.blocks.iter().filter(own).count();
            reserved += self.blocks_missing(sequence);
            places += 1;
        }
        let others = self.running.len() - places;
        let watermark = if others == 0 { 0 } else { self.config.blocks_watermark as usize };
        let taken = need + draft.reserved.saturating_sub(reserved) + watermark;
        places > 0 && others < self.config.sequences_max && self.pool.available() + blocks >= taken
    }

    /// Sends the running sequence of the worst rank back to wait, if its rank is worse than `rank`.
    fn preempt_below(
        &mut self,
        rank: Rank,
        draft: &mut Draft,
        out: &mut Vec<BatcherOutput>,
    ) -> bool {
        let Some((&worst, &id)) = self.running.last_key_value() else { return false };
        if worst <= rank {
            return false;
        }
        self.running.remove(&worst);
        let missing = self.blocks_missing(&self.sequences[&id]);
        let sequence = self.sequences.get_mut(&id).expect("running sequences exist");
        draft.budget += sequence.planned;
        draft.reserved = draft.reserved.saturating_sub(missing);
        sequence.release(&mut self.pool);
        let (phase, priority) = (sequence.phase, sequence.effective_priority);
        sequence.phase = Phase::Waiting;
        sequence.effective_priority = sequence.priority;
        self.lanes.move_from(sequence, phase, priority);
        self.stats.preemptions += 1;
        out.push(BatcherOutput::Preempted { sequence: id });
        true
    }

    /// Gives a running sequence the priority of one that waits for its blocks, so that those in
    /// between cannot hold up both.
    fn raise(&mut self, id: SequenceId, priority: i8) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if sequence.effective_priority >= priority {
            return;
        }
        self.running.remove(&sequence.rank());
        let before = std::mem::replace(&mut sequence.effective_priority, priority);
        self.running.insert(sequence.rank(), id);
        if sequence.phase == Phase::Prefill {
            self.lanes.move_from(sequence, Phase::Prefill, before);
        }
    }

    pub(super) fn blocks_reserved(&self) -> usize {
        self.running.values().map(|id| self.blocks_missing(&self.sequences[id])).sum()
    }

    /// Blocks that the rest of a running prompt will take.
    fn blocks_missing(&self, sequence: &Sequence) -> usize {
        match sequence.phase {
            Phase::Prefill => {
                sequence.tokens.len().div_ceil(self.config.block_tokens) - sequence.blocks.len()
            }
            Phase::Waiting | Phase::Decode => 0,
        }
    }

    fn write_plan(&mut self, now: Instant) -> Option<StepPlan> {
        let mut plan = StepPlan::default();
        let mut prompt_tokens = 0;
        for id in self.running.values() {
            let sequence = &self.sequences[id];
            let (start, end) = (sequence.computed, sequence.computed + sequence.planned);
            if start == end {
                continue;
            }
            let block_tokens = self.config.block_tokens;
            let covering = &sequence.blocks[..end.div_ceil(block_tokens)];
            for &block in &covering[start / block_tokens..] {
                assert!(self.pool.is_writable(block), "{id} would write what others can read");
            }
            if sequence.phase == Phase::Prefill {
                prompt_tokens += sequence.planned;
            }
            self.in_flight.push(*id);
            plan.sequences.push(SequenceStep {
                sequence: *id,
                tokens: sequence.tokens[start..end].to_vec(),
                position: start,
                blocks: covering.to_vec(),
                wanted: sequence.wanted(),
            });
        }
        if plan.sequences.is_empty() {
            return None;
        }
        let tokens = plan.token_count();
        assert!(tokens <= self.config.tokens_per_step_max, "a step of {tokens} tokens");
        self.pace.begin_step(now, prompt_tokens);
        self.stats.steps += 1;
        self.stats.computed_tokens += tokens as u64;
        Some(plan)
    }
}
