//! A prompt's blocks from elsewhere, before its sequence is submitted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cache::BlockHash;
use cache::transfer::{HandOff, HandOffOutcome, Prompt, Source};
use engine::replica::GenerateRequest;
use protocol::directory::Holder;
use protocol::transfer::KvFirstToken;
use protocol::{NodeId, RequestId, TenantId, TokenId};
use scheduler::router::{End, PlannedSource, PrefillAsk};
use tokio::sync::{mpsc, oneshot};

use super::directory::pool_part;
use super::pool::PoolCommand;
use super::transfers::{Ended, Input};
use super::{ModelKv, Running};
use crate::replica::ReplicaHandle;

/// Blocks that were brought for a request. Drop it when the request's sequence is submitted: until then
/// they cannot be evicted.
#[must_use]
pub(crate) struct Brought {
    replica: ReplicaHandle,
    request: RequestId,
    /// Tokens that another node has computed for this request: no cache had them.
    pub computed_tokens: usize,
}

impl Drop for Brought {
    fn drop(&mut self) {
        self.replica.pool(PoolCommand::End { request: self.request });
    }
}

/// What of a prompt's beginning nodes are said to have cached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Overlaps {
    pub tokens: BTreeMap<NodeId, u64>,
    /// Of them, the last of them, those that lie below a node's pool.
    pub below_tokens: BTreeMap<NodeId, u64>,
}

impl Overlaps {
    /// `in_pool` are holders in the pools of those `with_tiers`. The others have nothing below theirs.
    fn of(
        block_tokens: u64,
        anywhere: &[Holder],
        in_pool: &[Holder],
        with_tiers: &BTreeSet<NodeId>,
    ) -> Overlaps {
        let blocks = |holders: &[Holder], node: NodeId| {
            holders.iter().find(|holder| holder.node == node).map_or(0, |holder| holder.blocks)
        };
        let below = |holder: &&Holder| with_tiers.contains(&holder.node);
        let below = anywhere.iter().filter(below).map(|holder| {
            let blocks = holder.blocks.saturating_sub(blocks(in_pool, holder.node));
            (holder.node, u64::from(blocks) * block_tokens)
        });
        let tokens = |holder: &Holder| (holder.node, u64::from(holder.blocks) * block_tokens);
        Overlaps {
            tokens: anywhere.iter().map(tokens).collect(),
            below_tokens: below.filter(|(_, tokens)| *tokens > 0).collect(),
        }
    }
}

/// A hand-off that is waited for; it is cancelled when nobody waits any more.
struct Waiting {
    inputs: mpsc::Sender<Input>,
    request: RequestId,
    over: bool,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let (inputs, request) = (self.inputs.clone(), self.request);
        // Nothing is left to cancel once the runtime is gone.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { inputs.send(Input::Cancel { request }).await });
        }
    }
}

impl ModelKv {
    /// Gets what of a request's prompt is better had from peers than computed here. `None`: nothing. The
    /// request goes on in either case.
    pub async fn bring(
        self: &Arc<Self>,
        request: &GenerateRequest,
        deadline: Instant,
    ) -> Option<Brought> {
        let running = self.running.get()?;
        let mut tokens = request.prompt.clone();
        if let [before] = &request.resume[..] {
            tokens.extend(before.tokens.iter().map(|sampled| sampled.token));
        }
        // The last token is computed here in any case: its logits are wanted.
        let full = tokens.len().saturating_sub(1) / self.namer.block_tokens();
        if full == 0 || !running.roster.has_replica_elsewhere(&self.model, &self.fingerprint) {
            return None;
        }
        let mut names = self.namer.names(&request.tenant, &tokens);
        names.truncate(full);
        let (reply, known) = oneshot::channel();
        self.replica.pool(PoolCommand::Look { names: names.clone(), reply });
        let (known, below) = known.await.ok()?;
        if known >= full {
            return None;
        }
        let id = request.request;
        let sources = self.plan(running, id, (tokens.len(), known, below), &names).await;
        if sources.is_empty() {
            return None;
        }
        let handoff = HandOff {
            request: id,
            first: u32::try_from(known).ok()?,
            missing: names.split_off(known),
            prompt: Prompt {
                tenant: request.tenant.clone(),
                tokens,
                priority: request.priority,
                first_token: KvFirstToken::Receiver,
            },
            sources,
            // In the machine's time, once it has it.
            deadline: protocol::Instant::ORIGIN,
        };
        self.hand_off(running, handoff, deadline).await
    }

    /// What of the prompt's beginning each node is said to have cached.
    pub async fn overlap(&self, tenant: &TenantId, tokens: &[TokenId]) -> Overlaps {
        let Some(running) = self.running.get() else { return Overlaps::default() };
        self.overlap_of(running, &self.namer.names(tenant, tokens)).await
    }

    async fn overlap_of(&self, running: &Running, names: &[BlockHash]) -> Overlaps {
        let identity = self.format.identity;
        let mut with_tiers = running.roster.with_tiers(&self.model);
        if self.replica.stats().tiers.is_some() {
            with_tiers.extend(running.roster.mesh().map(|mesh| mesh.node()));
        }
        let anywhere = running.directory.holders(identity, names);
        let in_pool = async {
            match with_tiers.is_empty() {
                true => Vec::new(),
                false => running.directory.holders(pool_part(identity), names).await,
            }
        };
        let (anywhere, in_pool) = tokio::join!(anywhere, in_pool);
        Overlaps::of(self.namer.block_tokens() as u64, &anywhere, &in_pool, &with_tiers)
    }

    /// Whom to ask, the best first; nobody, where that costs more than computing it here.
    async fn plan(
        &self,
        running: &Running,
        request: RequestId,
        (tokens, known, below): (usize, usize, usize),
        names: &[BlockHash],
    ) -> Vec<Source> {
        let block_tokens = self.namer.block_tokens();
        let overlaps = self.overlap_of(running, names).await;
        let plan = running.roster.plan_prefill(&PrefillAsk {
            request,
            model: &self.model,
            prompt_tokens: tokens as u64,
            cached_tokens: (known * block_tokens) as u64,
            cached_below_tokens: (below * block_tokens) as u64,
            block_tokens: block_tokens as u32,
            overlap_tokens: &overlaps.tokens,
            below_tokens: &overlaps.below_tokens,
            suspected: &[],
        });
        let sources = plan.map(|plan| plan.sources).unwrap_or_default();
        // A prompt that is computed comes no faster than it is computed, and would keep streams from others
        // meanwhile.
        let streams = |s: &PlannedSource| match s.prefill {
            true => 1,
            false => running.roster.data_streams(s.peer),
        };
        let source =
            |s: PlannedSource| Source { peer: s.peer, prefill: s.prefill, streams: streams(&s) };
        sources.into_iter().map(source).collect()
    }

    async fn hand_off(
        &self,
        running: &Running,
        handoff: HandOff,
        deadline: Instant,
    ) -> Option<Brought> {
        let (request, first) = (handoff.request, handoff.sources[0]);
        let (ended, outcome) = oneshot::channel();
        let deadline = deadline.min(Instant::now() + HAND_OFF_MAX);
        let mut waiting = Waiting { inputs: running.inputs.clone(), request, over: false };
        running.inputs.send(Input::HandOff { handoff, deadline, ended }).await.ok()?;
        let mut brought = Brought { replica: self.replica.clone(), request, computed_tokens: 0 };
        let ended = outcome.await;
        waiting.over = true;
        let Ended { verified, outcome, took, from_first } = ended.ok()?;
        let is_complete = matches!(outcome, HandOffOutcome::Complete { .. });
        if is_complete && from_first && !first.prefill {
            // Nothing was waited for but the path.
            let bytes = verified as u64 * u64::from(self.format.block_bytes);
            running.roster.carried(first.peer, bytes, took);
        }
        let cached = match outcome {
            HandOffOutcome::Complete { cached, .. } => (cached as usize).min(verified),
            _ if first.prefill => 0,
            _ => verified,
        };
        brought.computed_tokens = (verified - cached) * self.namer.block_tokens();
        let end = match outcome {
            HandOffOutcome::Complete { .. } => End::Done,
            HandOffOutcome::NoRoom | HandOffOutcome::Rejected(_) => End::Refused,
            _ => End::Failed,
        };
        running.roster.prefill_ended(request, end);
        Some(brought)
    }
}

/// Longest wait for blocks from elsewhere.
const HAND_OFF_MAX: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_in_a_pool_lies_below_it() {
        let node = |n: u8| NodeId([n; 32]);
        let holder = |(n, blocks): (u8, u32)| Holder { node: node(n), blocks };
        let check = |anywhere: &[(u8, u32)], in_pool: &[(u8, u32)], below: &[(u8, u64)]| {
            let of =
                |holders: &[(u8, u32)]| holders.iter().copied().map(holder).collect::<Vec<_>>();
            let with_tiers = [node(1), node(2)].into();
            let overlaps = Overlaps::of(16, &of(anywhere), &of(in_pool), &with_tiers);
            let expect: BTreeMap<_, _> =
                below.iter().map(|&(n, tokens)| (node(n), tokens)).collect();
            assert_eq!(overlaps.below_tokens, expect, "{anywhere:?} {in_pool:?}");
            assert_eq!(overlaps.tokens.len(), anywhere.len());
        };
        check(&[(1, 5), (3, 9)], &[(1, 5)], &[]);
        check(&[(1, 5), (2, 4)], &[(1, 2)], &[(1, 48), (2, 64)]);
        // the answers are of two moments
        check(&[(1, 5)], &[(1, 7)], &[]);
        // who has no tiers has everything in its pool
        check(&[(3, 9)], &[], &[]);
    }
}
