//! Where the keys and values of a prompt come from, decided by the node that decodes it: computed here,
//! fetched from a peer's cache, or computed by a peer while this node goes on decoding.
//!
//! A peer does the prefill if
//!
//! ```text
//! queue_p + prefill_p + harm_p + max(0, bytes / bandwidth - prefill_p) + commit  <  queue_d + prefill_d + harm_d
//! ```
//!
//! by a margin ([`RouterConfig::gain_min`]), where `harm` is what a prefill costs the streams that decode
//! beside it: the reason to keep prefill and decode apart. Figures of other nodes are as old as their
//! records; what a peer really has, it says itself when it is asked.

use std::collections::BTreeMap;

use protocol::node_record::NodeRole;
use protocol::{Instant, NodeId, RequestId};

use super::cost::{
    compute_us, fetch_us, hand_off_us, harm_us, is_gain, raise_ns_per_token, raise_us, turn_us,
};
use super::decisions::Decided;
use super::least::Least;
use super::links::LinkFigures;
use super::nodes::Seat;
use super::{Router, RouterConfig};

/// Whether others compute prompts for this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Disagg {
    /// Where it pays.
    #[default]
    Auto,
    /// Wherever a peer can, whatever it costs.
    Always,
    /// Never. Cached prefixes are still fetched.
    Never,
}

impl Disagg {
    pub const ALL: [Disagg; 3] = [Disagg::Auto, Disagg::Always, Disagg::Never];

    pub const fn as_str(self) -> &'static str {
        match self {
            Disagg::Auto => "auto",
            Disagg::Always => "always",
            Disagg::Never => "never",
        }
    }
}

/// A prompt that this node's replica is about to run.
#[derive(Clone, Copy, Debug)]
pub struct PrefillInputs<'a> {
    pub mode: Disagg,
    /// All of the prompt.
    pub prompt_tokens: u64,
    /// The beginning of it that is in this node's cache.
    pub cached_tokens: u64,
    /// How many of these, the last of them, lie below its pool.
    pub below_tokens: u64,
    /// Keys and values of one token, in bytes; 0 if not known, and then nothing is moved.
    pub bytes_per_token: u32,
    /// Tokens of a block: less than that cannot be moved.
    pub block_tokens: u32,
    pub here: PrefillLoad,
    /// Nodes with a ready replica of the same weights.
    pub peers: &'a [PrefillPeer],
}

/// What a replica has to do before and beside a new prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefillLoad {
    /// Prompt tokens not yet computed, of all that came before.
    pub queue_tokens: u64,
    /// Prompt tokens per second; 0 if not measured.
    pub prefill_rate: u32,
    /// Sequences that decode.
    pub running: u64,
    /// Until it hears who wants blocks of it, or brings it some: it does between two steps.
    pub turn_us: u64,
    /// What a token that lies below its pool takes to be in it.
    pub raise_ns_per_token: u64,
}

/// A peer that could help.
#[derive(Clone, Copy, Debug)]
pub struct PrefillPeer {
    pub node: NodeId,
    pub role: NodeRole,
    pub load: PrefillLoad,
    /// The beginning of the prompt that it has cached.
    pub overlap_tokens: u64,
    /// How many of these, the last of them, lie below its pool.
    pub below_tokens: u64,
    /// The path from here to it.
    pub link: LinkFigures,
    /// Suspected, failing, draining, or its path is down: not asked.
    pub avoid: bool,
}

/// One way to the prompt's keys and values, and what it costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillOption {
    /// `None`: this node computes all that its cache has not.
    pub peer: Option<NodeId>,
    /// The peer computes what it has not; otherwise it sends what it has and this node computes the
    /// rest.
    pub prefill: bool,
    /// Prompts before it, where it is computed.
    pub queue_us: u64,
    /// Bringing up what lies below the pools, here and there.
    pub raise_us: u64,
    /// Computing it.
    pub prefill_us: u64,
    /// Bringing it here, as far as the prefill does not hide it.
    pub kv_us: u64,
    /// What it costs the streams that decode there, weighed.
    pub harm_us: u64,
}

impl PrefillOption {
    /// Until decoding can begin.
    pub fn ttft_us(&self) -> u64 {
        self.queue_us
            .saturating_add(self.raise_us)
            .saturating_add(self.prefill_us)
            .saturating_add(self.kv_us)
    }

    /// Lower is better.
    pub fn cost_us(&self) -> u64 {
        self.ttft_us().saturating_add(self.harm_us)
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefillPlan {
    pub mode: Disagg,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    /// Of them, those below this node's pool.
    pub below_tokens: u64,
    /// Whom to ask, the best first, and whether to prefill; at most [`SOURCES_MAX`]. Empty: nobody.
    pub sources: Vec<PlannedSource>,
    /// Doing it here, then what peers were weighed against it, the cheapest first; at most
    /// [`OPTIONS_KEPT_MAX`].
    pub options: Vec<PrefillOption>,
    /// Peers that were not looked at: suspected, failing, or with nothing to give.
    pub passed_over: usize,
}

/// A peer to ask for blocks, as in the hand-off's own list of sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedSource {
    pub peer: NodeId,
    pub prefill: bool,
}

/// What a plan comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefillKind {
    Recompute,
    Fetch,
    Remote,
}

impl PrefillPlan {
    pub fn kind(&self) -> PrefillKind {
        match self.sources.first() {
            None => PrefillKind::Recompute,
            Some(PlannedSource { prefill: false, .. }) => PrefillKind::Fetch,
            Some(PlannedSource { prefill: true, .. }) => PrefillKind::Remote,
        }
    }

    /// The option that is taken.
    pub fn chosen(&self) -> &PrefillOption {
        let first = self.sources.first();
        let is_it = |o: &&PrefillOption| {
            first.is_some_and(|s| o.peer == Some(s.peer) && o.prefill == s.prefill)
        };
        self.options.iter().find(is_it).unwrap_or(&self.options[0])
    }
}

/// Decides it. Never fails: with nobody to ask, or too little to gain, this node computes the prompt.
pub fn plan_prefill(inputs: &PrefillInputs<'_>, config: &RouterConfig) -> PrefillPlan {
    let here = here(inputs, config);
    // Equal costs in the order of ids: the same inputs give the same plan.
    let mut options = Least::new(OPTIONS_KEPT_MAX - 1);
    let mut sources = Least::new(SOURCES_MAX);
    let mut passed_over = 0;
    for peer in inputs.peers {
        let best = [fetch(inputs, peer, config), remote(inputs, peer, config)]
            .into_iter()
            .flatten()
            .min_by_key(|&(is_second_rank, option)| (is_second_rank, option.cost_us()));
        let Some((is_second_rank, option)) = best else {
            passed_over += 1;
            continue;
        };
        let key = (is_second_rank, option.cost_us(), peer.node);
        let always = inputs.mode == Disagg::Always && option.prefill;
        if always || is_gain(here.cost_us(), option.cost_us(), config) {
            sources.offer(key, PlannedSource { peer: peer.node, prefill: option.prefill });
        }
        options.offer(key, option);
    }
    PrefillPlan {
        mode: inputs.mode,
        prompt_tokens: inputs.prompt_tokens,
        cached_tokens: inputs.cached_tokens,
        below_tokens: inputs.below_tokens,
        sources: sources.into_values().collect(),
        options: [here].into_iter().chain(options.into_values()).collect(),
        passed_over,
    }
}

/// A prompt that is about to run on this node's replica of a model.
#[derive(Clone, Copy, Debug)]
pub struct PrefillAsk<'a> {
    pub request: RequestId,
    pub model: &'a str,
    pub prompt_tokens: u64,
    /// The beginning of it that is in this node's cache.
    pub cached_tokens: u64,
    /// How many of these, the last of them, lie below its pool.
    pub cached_below_tokens: u64,
    pub block_tokens: u32,
    /// How many of its first tokens each node has cached, as far as anybody knows.
    pub overlap_tokens: &'a BTreeMap<NodeId, u64>,
    /// How many of these, the last of them, lie below the node's pool.
    pub below_tokens: &'a BTreeMap<NodeId, u64>,
    /// Nodes that membership suspects: not asked.
    pub suspected: &'a [NodeId],
}

impl Router {
    /// [`plan_prefill`] with what this router knows of itself and of others, and written down. `None`
    /// if this node has no such replica. The hand-off's end is to be told to
    /// [`Decisions::prefill_ended`](super::Decisions::prefill_ended).
    pub fn plan_prefill(&mut self, now: Instant, ask: &PrefillAsk<'_>) -> Option<PrefillPlan> {
        let own = *self.nodes.node(self.own)?.replicas.get(ask.model)?;
        let model = self.nodes.model(ask.model)?;
        let mut peers = Vec::with_capacity(model.seats.len().min(PEERS_MAX));
        let mut overlaps = ask.overlap_tokens.iter().peekable();
        for seat in &model.seats {
            let Seat { node: id, load, .. } = *seat;
            if id == self.own || load.weights != own.weights || peers.len() == PEERS_MAX {
                continue;
            }
            while overlaps.next_if(|(node, _)| **node < id).is_some() {}
            let overlap_tokens = overlaps.next_if(|(node, _)| **node == id);
            let gate = self.nodes.gate(seat);
            peers.push(PrefillPeer {
                node: id,
                role: load.role,
                load: PrefillLoad {
                    queue_tokens: load.prompt_tokens,
                    prefill_rate: load.prefill_rate,
                    running: u64::from(load.running),
                    turn_us: seat.turn_us,
                    raise_ns_per_token: raise_ns_per_token(&load),
                },
                overlap_tokens: overlap_tokens.map_or(0, |(_, &tokens)| tokens),
                below_tokens: ask.below_tokens.get(&id).copied().unwrap_or(0),
                link: self.nodes.link(seat).unwrap_or_default(),
                avoid: !load.ready || gate.asked_from > now || ask.suspected.contains(&id),
            });
        }
        let inputs = PrefillInputs {
            mode: self.config.disagg,
            prompt_tokens: ask.prompt_tokens,
            cached_tokens: ask.cached_tokens,
            below_tokens: ask.cached_below_tokens,
            bytes_per_token: own.kv_bytes_per_token,
            block_tokens: ask.block_tokens,
            here: PrefillLoad {
                queue_tokens: own.prompt_tokens,
                prefill_rate: own.prefill_rate,
                running: u64::from(own.running),
                turn_us: turn_us(&own, &self.config),
                raise_ns_per_token: raise_ns_per_token(&own),
            },
            peers: &peers,
        };
        let plan = plan_prefill(&inputs, &self.config);
        self.decisions.record(now, ask.request, Decided::Prefill(plan.clone()));
        Some(plan)
    }
}

/// Tokens that nobody here has computed.
fn missing(inputs: &PrefillInputs<'_>) -> u64 {
    inputs.prompt_tokens.saturating_sub(inputs.cached_tokens)
}

fn here(inputs: &PrefillInputs<'_>, config: &RouterConfig) -> PrefillOption {
    let prefill_us = compute_us(missing(inputs), inputs.here.prefill_rate);
    PrefillOption {
        peer: None,
        prefill: false,
        queue_us: compute_us(inputs.here.queue_tokens, inputs.here.prefill_rate),
        raise_us: raise_here_us(inputs),
        prefill_us,
        kv_us: 0,
        harm_us: harm_us(prefill_us, inputs.here.running, config),
    }
}

/// Until what this node has is in its pool, whichever way the rest comes.
fn raise_here_us(inputs: &PrefillInputs<'_>) -> u64 {
    let below = inputs.below_tokens.min(inputs.cached_tokens);
    raise_us(below, inputs.here.raise_ns_per_token)
}

/// Until so many of the last tokens of what a peer has are in its pool, as far as they lie below it.
fn raise_there_us(peer: &PrefillPeer, tokens: u64) -> u64 {
    let below = peer.below_tokens.min(peer.overlap_tokens).min(tokens);
    raise_us(below, peer.load.raise_ns_per_token)
}

/// Both ends of a transfer.
fn turns_us(inputs: &PrefillInputs<'_>, peer: &PrefillPeer) -> u64 {
    inputs.here.turn_us.saturating_add(peer.load.turn_us)
}

/// With `true` where it ranks behind all others, whatever it costs.
fn fetch(
    inputs: &PrefillInputs<'_>,
    peer: &PrefillPeer,
    config: &RouterConfig,
) -> Option<(bool, PrefillOption)> {
    let overlap = peer.overlap_tokens.min(inputs.prompt_tokens);
    let more = overlap.saturating_sub(inputs.cached_tokens);
    if peer.avoid || inputs.bytes_per_token == 0 || more < u64::from(inputs.block_tokens.max(1)) {
        return None;
    }
    let rate = inputs.here.prefill_rate;
    let prefill_us = compute_us(inputs.prompt_tokens - overlap, rate);
    let turns_us = [inputs.here.turn_us, peer.load.turn_us];
    let option = PrefillOption {
        peer: Some(peer.node),
        prefill: false,
        queue_us: compute_us(inputs.here.queue_tokens, rate),
        raise_us: raise_here_us(inputs).saturating_add(raise_there_us(peer, more)),
        prefill_us,
        kv_us: fetch_us(more, inputs.bytes_per_token, peer.link, turns_us),
        harm_us: harm_us(prefill_us, inputs.here.running, config),
    };
    Some((inputs.mode == Disagg::Always, option))
}

fn remote(
    inputs: &PrefillInputs<'_>,
    peer: &PrefillPeer,
    config: &RouterConfig,
) -> Option<(bool, PrefillOption)> {
    let block = u64::from(inputs.block_tokens.max(1));
    let helps = inputs.mode != Disagg::Never
        && inputs.bytes_per_token > 0
        && peer.role != NodeRole::Decode
        && !peer.avoid;
    // Only full blocks come; the rest of the prompt is computed here.
    let full = inputs.prompt_tokens / block * block;
    let moved = full.saturating_sub(inputs.cached_tokens);
    if !helps || moved < block {
        return None;
    }
    let rest_us = compute_us(inputs.prompt_tokens - full, inputs.here.prefill_rate);
    // What is cached here does not help the peer: it needs all that comes before.
    let computed = full.saturating_sub(peer.overlap_tokens);
    let prefill_us = compute_us(computed, peer.load.prefill_rate);
    let option = PrefillOption {
        peer: Some(peer.node),
        prefill: true,
        queue_us: compute_us(peer.load.queue_tokens, peer.load.prefill_rate),
        raise_us: raise_here_us(inputs).saturating_add(raise_there_us(peer, full)),
        prefill_us: prefill_us.saturating_add(rest_us),
        kv_us: hand_off_us(moved, inputs.bytes_per_token, peer.link, prefill_us)
            .saturating_add(turns_us(inputs, peer)),
        harm_us: harm_us(prefill_us, peer.load.running, config),
    };
    // Where everything goes to peers, those that are there for it come first.
    Some((inputs.mode == Disagg::Always && peer.role != NodeRole::Prefill, option))
}

/// Peers asked for one prompt, one after the other: each that does not answer costs up to a second, after
/// which this node could have computed it.
pub const SOURCES_MAX: usize = 4;

/// Peers weighed for one prompt; the rest is not looked at.
pub const PEERS_MAX: usize = 4096;

/// Options that a plan remembers, for those who ask later.
pub const OPTIONS_KEPT_MAX: usize = 9;
