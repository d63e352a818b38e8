//! Everyone who could answer a request, with what each would cost.

use std::collections::{BTreeMap, btree_map};
use std::iter::Peekable;

use protocol::node_record::NodeRole;
use protocol::{Instant, NodeId};

use super::cost::{
    CostParts, KvPath, compute_us, decode_us, hand_off_us, harm_us, is_gain, micros, transfer_us,
};
use super::decisions::{Candidate, Rank};
use super::links::LinkFigures;
use super::{Ask, Disagg, Node, ReplicaLoad, Router, RouterConfig, Unavailable};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Survey {
    pub candidates: Vec<Candidate>,
    /// The path to each of them; `None`: it is this node.
    links: Vec<Option<LinkFigures>>,
    pub unavailable: Vec<(NodeId, Unavailable)>,
    /// Whose cache could be fetched from: the two that have most of the prompt, so that one is left
    /// for each of them.
    fetch: Two,
    /// Who could compute the prompt for another: the two that would be done first.
    prefill: Two,
}

/// The two best of many: a node, how good it is (more is better), and its path.
#[derive(Clone, Copy, Debug, Default)]
struct Two([Option<(NodeId, u64, Helper)>; 2]);

/// What is to be known of a node that helps.
#[derive(Clone, Copy, Debug, Default)]
struct Helper {
    /// `None`: it is this node.
    link: Option<LinkFigures>,
    queue_us: u64,
    prefill_us: u64,
    streams: u64,
}

impl Two {
    fn offer(&mut self, node: NodeId, good: u64, helper: Helper) {
        let new = Some((node, good, helper));
        match self.0 {
            [Some((_, best, _)), _] if good <= best => {
                if self.0[1].is_none_or(|(_, second, _)| good > second) {
                    self.0[1] = new;
                }
            }
            [best, _] => self.0 = [new, best],
        }
    }

    /// The best that is not this one.
    fn other_than(&self, node: NodeId) -> Option<(NodeId, u64, Helper)> {
        self.0.iter().flatten().find(|(other, ..)| *other != node).copied()
    }
}

impl Survey {
    /// Looks at every node. `weights` are those that the model's name stands for.
    pub fn take(&mut self, router: &Router, now: Instant, ask: &Ask<'_>, weights: Option<u64>) {
        self.candidates.clear();
        self.links.clear();
        self.unavailable.clear();
        (self.fetch, self.prefill) = (Two::default(), Two::default());
        let mut links = Along::new(router.links.all());
        let mut overlaps = Along::new(ask.overlap_tokens);
        for (&id, node) in &router.nodes {
            let Some(reported) = node.replicas.get(ask.model) else { continue };
            let own = id == router.own;
            if let Some(why) = node.unavailable(now, own, reported, ask.excluded, id) {
                self.unavailable.push((id, why));
                continue;
            }
            if ask.weights.is_some_and(|weights| weights != reported.weights) {
                self.unavailable.push((id, Unavailable::OtherWeights));
                continue;
            }
            let overlap_tokens = overlaps.at(&id).copied().unwrap_or(0);
            let link = (!own).then(|| links.at(&id).copied().unwrap_or_default());
            let candidate = seen(router, (id, node), reported, overlap_tokens, ask, weights);
            if !candidate.rank.other_weights && !candidate.rank.suspected {
                self.offer_help(link, &candidate, ask);
            }
            self.candidates.push(candidate);
            self.links.push(link);
        }
        for place in 0..self.candidates.len() {
            let (candidate, link) = (&self.candidates[place], self.links[place]);
            let parts = self.estimate(&router.config, candidate, link, ask);
            self.candidates[place].parts = parts;
        }
    }

    /// Remembers a node that others could get keys and values from.
    fn offer_help(&mut self, link: Option<LinkFigures>, candidate: &Candidate, ask: &Ask<'_>) {
        let Candidate { node, load, overlap_tokens, parts, rank } = candidate;
        let queue_us = parts.queue_us;
        let left = ask.prompt_tokens - overlap_tokens;
        let prefill_us = compute_us(left, load.prefill_rate);
        let helper = Helper { link, queue_us, prefill_us, streams: streams(load) };
        if *overlap_tokens > 0 {
            self.fetch.offer(*node, *overlap_tokens, helper);
        }
        if load.role != NodeRole::Decode && !rank.overloaded {
            let done_us = queue_us.saturating_add(prefill_us);
            self.prefill.offer(*node, u64::MAX - done_us, helper);
        }
    }

    /// The cheapest way of the candidate to the prompt's keys and values, and what the answer costs
    /// with it.
    fn estimate(
        &self,
        config: &RouterConfig,
        candidate: &Candidate,
        link: Option<LinkFigures>,
        ask: &Ask<'_>,
    ) -> CostParts {
        let Candidate { node, load, overlap_tokens: overlap, .. } = *candidate;
        let hop = |link: LinkFigures| config.hop_cost.saturating_add(link.rtt.unwrap_or_default());
        let hop_us = link.map_or(0, |link| micros(hop(link)));
        let queue_us = candidate.parts.queue_us;
        let gaps_us = decode_us(load.decode_step_us, streams(&load), ask.output_tokens, config);
        let parts = |path, queue_us, kv_us, prefill_us, streams| CostParts {
            path,
            queue_us,
            kv_us,
            prefill_us,
            hop_us,
            decode_us: gaps_us.saturating_add(harm_us(prefill_us, streams, config)),
        };
        let beside = streams(&load);
        let path = if overlap > 0 { KvPath::Local } else { KvPath::Recompute };
        let compute = |tokens: u64| compute_us(tokens, load.prefill_rate);
        let here = parts(path, queue_us, 0, compute(ask.prompt_tokens - overlap), beside);
        let mut best = here;
        let bytes_per_token = load.kv_bytes_per_token;
        // What is not known to weigh anything cannot be weighed.
        if bytes_per_token == 0 || candidate.rank.other_weights {
            return here;
        }
        if let Some((from, most, helper)) = self.fetch.other_than(node)
            && most >= overlap + MOVED_TOKENS_MIN
        {
            let way = way(link, helper.link);
            let kv_us = transfer_us(most - overlap, bytes_per_token, way)
                .saturating_add(micros(way.rtt_or_guess()));
            let left = compute(ask.prompt_tokens - most);
            let fetched = parts(KvPath::Fetch { from }, queue_us, kv_us, left, beside);
            best = better(best, fetched, here, config);
        }
        let missing = ask.prompt_tokens - overlap;
        if config.disagg != Disagg::Never
            && missing >= MOVED_TOKENS_MIN
            && let Some((by, _, helper)) = self.prefill.other_than(node)
        {
            let way = way(link, helper.link);
            let kv_us = hand_off_us(missing, bytes_per_token, way, helper.prefill_us);
            let path = KvPath::Remote { by };
            let remote = parts(path, helper.queue_us, kv_us, helper.prefill_us, helper.streams);
            best = better(best, remote, here, config);
        }
        best
    }
}

/// The other way if it is cheaper, and by enough than doing it here.
fn better(best: CostParts, other: CostParts, here: CostParts, config: &RouterConfig) -> CostParts {
    let other_us = other.score_us();
    match other_us < best.score_us() && is_gain(here.score_us(), other_us, config) {
        true => other,
        false => best,
    }
}

/// A replica with what was sent there since its report; of its costs only the queue yet.
fn seen(
    router: &Router,
    (id, node): (NodeId, &Node),
    reported: &ReplicaLoad,
    overlap_tokens: u64,
    ask: &Ask<'_>,
    weights: Option<u64>,
) -> Candidate {
    let (sent, sent_tokens) = node.sent_since_report(&router.config, ask.model);
    let load = ReplicaLoad {
        waiting: reported.waiting.saturating_add(sent),
        prompt_tokens: reported.prompt_tokens.saturating_add(sent_tokens),
        ..*reported
    };
    let queue_us = compute_us(load.prompt_tokens, load.prefill_rate);
    let crowded = load.kv_blocks > 0
        && load.waiting > 0
        && load.kv_blocks_free < load.kv_blocks / KV_FREE_SHARE_MIN;
    let rank = Rank {
        other_weights: Some(load.weights) != weights,
        suspected: ask.suspected.contains(&id),
        prefill_only: load.role == NodeRole::Prefill,
        overloaded: crowded || queue_us > micros(router.config.queue_max),
    };
    // The last token is always computed: its logits are what is wanted.
    let most = ask.prompt_tokens.saturating_sub(1);
    let overlap_tokens = overlap_tokens.min(most);
    let path = KvPath::Recompute;
    let parts = CostParts { path, queue_us, kv_us: 0, prefill_us: 0, hop_us: 0, decode_us: 0 };
    Candidate { node: id, load, overlap_tokens, rank, parts }
}

/// Looks things up in ascending order: one walk instead of as many searches as there are nodes.
struct Along<'a, V>(Peekable<btree_map::Iter<'a, NodeId, V>>);

impl<'a, V> Along<'a, V> {
    fn new(all: &'a BTreeMap<NodeId, V>) -> Self {
        Along(all.iter().peekable())
    }

    /// What there is for the node; no node asked for later comes before it.
    fn at(&mut self, node: &NodeId) -> Option<&'a V> {
        while self.0.next_if(|(id, _)| *id < node).is_some() {}
        self.0.next_if(|(id, _)| *id == node).map(|(_, value)| value)
    }
}

/// The path between two nodes, of which `None` is this one.
fn way(a: Option<LinkFigures>, b: Option<LinkFigures>) -> LinkFigures {
    match (a, b) {
        (Some(a), Some(b)) => LinkFigures::between(a, b),
        (a, b) => a.or(b).unwrap_or_default(),
    }
}

/// Those that decode, and those that will.
fn streams(load: &ReplicaLoad) -> u64 {
    u64::from(load.running) + u64::from(load.waiting)
}

/// Fewer tokens are not worth a message: a block's.
const MOVED_TOKENS_MIN: u64 = 16;
/// A replica on which sequences wait while less than this part of its blocks is free (one of so many)
/// cannot begin more.
const KV_FREE_SHARE_MIN: u32 = 16;
