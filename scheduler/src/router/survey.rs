//! Everyone who could answer a request, with what each would cost, and which of them is taken.
//!
//! Thousands of replicas may have the model, and a decision may not take longer than a packet's way. So
//! the replicas are walked twice and nothing is built for each. The first walk sees who can be asked, and
//! who could help others. The second works out what each would cost, unless it is plain that it would
//! neither be chosen nor be remembered.

use protocol::node_record::NodeRole;
use protocol::{Instant, NodeId, RequestId};

use super::config::Policy;
use super::cost::{
    CostParts, KvPath, compute_us, decode_us, fetch_us, hand_off_us, harm_us, is_gain, micros,
    raise_ns_per_token, raise_us, streams,
};
use super::decisions::{Candidate, OTHERS_KEPT_MAX, Rank, Why};
use super::least::Least;
use super::links::LinkFigures;
use super::nodes::{Gate, Model, Nodes, Seat};
use super::{Ask, Disagg, RouterConfig, Unavailable};

/// What a survey looks at.
#[derive(Clone, Copy)]
pub(super) struct Scene<'a> {
    pub config: &'a RouterConfig,
    pub own: NodeId,
    pub nodes: &'a Nodes,
    pub model: &'a Model,
    pub now: Instant,
    pub ask: &'a Ask<'a>,
    /// Those that the model's name stands for.
    pub weights: Option<u64>,
    /// How many decisions came before this one.
    pub turn: u64,
}

/// Who is taken.
pub(super) struct Taken {
    pub chosen: Candidate,
    pub why: Why,
    /// The best of the others, at most [`OTHERS_KEPT_MAX`].
    pub others: Vec<Candidate>,
    pub others_total: usize,
}

/// See the module. It is kept between decisions for its memory.
#[derive(Debug, Default)]
pub(super) struct Survey {
    pub unavailable: Vec<(NodeId, Unavailable)>,
    /// One for each replica.
    marks: Vec<Mark>,
    open: Vec<Open>,
    helpers: Helpers,
    floors: Floors,
}

/// Who could help another to a prompt's keys and values.
#[derive(Clone, Copy, Debug, Default)]
struct Helpers {
    /// Whose cache could be fetched from: the two that have most of the prompt, so that one is left
    /// for each of them.
    fetch: Two,
    /// Who could compute it: the two that would be done first.
    prefill: Two,
}

/// What the request says of a replica's node.
#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    overlap_tokens: u64,
    below_tokens: u64,
    excluded: bool,
    suspected: bool,
}

/// A replica that can be asked.
#[derive(Clone, Copy, Debug)]
struct Open {
    /// Among those of the model.
    place: u32,
    overlap_tokens: u64,
    below_tokens: u64,
    rank: Rank,
    /// Until what lies below its pool is in it.
    raise_us: u64,
    /// Of what it has not cached.
    prefill_us: u64,
    /// What the way there and the answer's own gaps cost, in any case.
    base_us: u64,
    /// The same, and its queue.
    queued_us: u64,
    /// All of it, if the replica computes what it has not cached.
    here_us: u64,
}

/// One with its costs.
#[derive(Clone, Copy, Debug)]
struct Scored {
    open: Open,
    /// What the policy goes by, lower is better.
    key: u64,
    parts: CostParts,
}

/// The cheapest, by rank and costs.
type Kept = Least<(Rank, u64), Scored>;

/// The two best of many: a node, how good it is (more is better), and what is to be known of it.
#[derive(Clone, Copy, Debug, Default)]
struct Two([Option<(NodeId, u64, Helper)>; 2]);

/// What is to be known of a node that helps.
#[derive(Clone, Copy, Debug, Default)]
struct Helper {
    /// `None`: it is this node.
    link: Option<LinkFigures>,
    queue_us: u64,
    prefill_us: u64,
    /// What that costs those that decode there.
    harm_us: u64,
    turn_us: u64,
    /// What lies below its pool, and what a token of that takes.
    below_tokens: u64,
    raise_ns_per_token: u64,
}

impl Two {
    fn offer(&mut self, node: NodeId, good: u64, helper: impl FnOnce() -> Helper) {
        let place = match self.0 {
            [Some((_, best, _)), second] if good <= best => {
                if second.is_some_and(|(_, second, _)| good <= second) {
                    return;
                }
                1
            }
            [best, _] => {
                self.0[1] = best;
                0
            }
        };
        self.0[place] = Some((node, good, helper()));
    }

    /// The best that is not this one.
    fn other_than(&self, node: NodeId) -> Option<&(NodeId, u64, Helper)> {
        self.0.iter().flatten().find(|(other, ..)| *other != node)
    }
}

/// What it costs at least to get a prompt's keys and values from another.
#[derive(Clone, Copy, Debug, Default)]
struct Floors {
    /// Fetched from a cache, to a replica that has none of them.
    fetched_us: u64,
    /// Computed elsewhere, for a replica that has none of them.
    computed_us: u64,
    /// The same for one that has some.
    warm_us: u64,
}

impl Helpers {
    /// Remembers a replica that others could get keys and values from.
    fn offer(
        &mut self,
        seat: &Seat,
        overlap_tokens: u64,
        prefill_us: u64,
        helper: impl Fn() -> Helper,
    ) {
        if overlap_tokens > 0 {
            self.fetch.offer(seat.node, overlap_tokens, &helper);
        }
        if seat.load.role != NodeRole::Decode && !seat.overloaded {
            let done_us = seat.queue_us.saturating_add(prefill_us);
            self.prefill.offer(seat.node, u64::MAX - done_us, helper);
        }
    }

    /// What the ways of blocks cost at least, to replicas of which none has lighter ones than
    /// `bytes_per_token`. No path between two is better than the helper's own, as it is seen from here.
    fn floors(&self, config: &RouterConfig, prompt_tokens: u64, bytes_per_token: u32) -> Floors {
        let fetched_us = |(_, tokens, from): &(NodeId, u64, Helper)| {
            let kv_us = |link| fetch_us(*tokens, bytes_per_token, link, [from.turn_us, 0]);
            from.link.map_or(from.turn_us, kv_us)
        };
        let there_us = |by: &Helper| {
            let prefill_us = by.prefill_us.saturating_add(by.harm_us);
            by.queue_us.saturating_add(prefill_us).saturating_add(by.turn_us)
        };
        let computed_us = |(_, _, by): &(NodeId, u64, Helper)| {
            let kv_us = |link| hand_off_us(prompt_tokens, bytes_per_token, link, by.prefill_us);
            there_us(by).saturating_add(by.link.map_or(0, kv_us))
        };
        let fetch = || self.fetch.0.iter().flatten();
        let prefill = || self.prefill.0.iter().flatten().filter(|_| config.disagg != Disagg::Never);
        Floors {
            fetched_us: fetch().map(fetched_us).min().unwrap_or(u64::MAX),
            computed_us: prefill().map(computed_us).min().unwrap_or(u64::MAX),
            warm_us: prefill().map(|(_, _, by)| there_us(by)).min().unwrap_or(u64::MAX),
        }
    }
}

impl Floors {
    /// The least that a replica can cost, whichever way it takes to the prompt's keys and values.
    fn least_us(&self, open: &Open) -> u64 {
        let (fetched_us, computed_us) = match open.overlap_tokens {
            0 => (self.fetched_us, self.computed_us),
            _ => (0, self.warm_us),
        };
        open.here_us
            .min(open.queued_us.saturating_add(fetched_us))
            .min(open.base_us.saturating_add(computed_us))
    }
}

impl Survey {
    /// Looks at every replica of the model. `None`: none can be asked, and `unavailable` says why.
    pub fn take(&mut self, scene: &Scene<'_>) -> Option<Taken> {
        self.mark(scene);
        self.see(scene);
        let (best, kept) = self.score(scene)?;
        let why = match (best.open.rank.is_first(), self.open.len()) {
            (false, _) => Why::LastResort,
            (true, 1) => Why::Only,
            (true, _) => Why::Cheapest,
        };
        let learnt = (why == Why::Cheapest).then(|| self.explore(scene, &best)).flatten();
        let (chosen, why) = learnt.map_or((best, why), |other| (other, Why::Explored));
        let others = kept.into_values().filter(|other| other.open.place != chosen.open.place);
        Some(Taken {
            chosen: candidate(scene, &chosen),
            why,
            others: others.take(OTHERS_KEPT_MAX).map(|other| candidate(scene, &other)).collect(),
            others_total: self.open.len() - 1,
        })
    }

    /// Notes what the request says of some nodes.
    fn mark(&mut self, scene: &Scene<'_>) {
        let (model, ask) = (scene.model, scene.ask);
        self.marks.clear();
        self.marks.resize(model.seats.len(), Mark::default());
        let mut mark = |node: NodeId, note: &dyn Fn(&mut Mark)| {
            if let Ok(place) = model.place(node) {
                note(&mut self.marks[place]);
            }
        };
        // The last token is always computed: its logits are what is wanted.
        let most = ask.prompt_tokens.saturating_sub(1);
        for (&node, &tokens) in ask.overlap_tokens {
            mark(node, &|mark| mark.overlap_tokens = tokens.min(most));
        }
        for (&node, &tokens) in ask.below_tokens {
            mark(node, &|mark| mark.below_tokens = tokens.min(mark.overlap_tokens));
        }
        ask.excluded.iter().for_each(|&node| mark(node, &|mark| mark.excluded = true));
        ask.suspected.iter().for_each(|&node| mark(node, &|mark| mark.suspected = true));
    }

    /// Finds who can be asked, and who can help them.
    fn see(&mut self, scene: &Scene<'_>) {
        let Scene { nodes, now, ask, .. } = *scene;
        self.unavailable.clear();
        self.open.clear();
        self.helpers = Helpers::default();
        let mut bytes_per_token = u32::MAX;
        for (place, (seat, mark)) in scene.model.seats.iter().zip(&self.marks).enumerate() {
            let gate = nodes.gate(seat);
            let other_weights = ask.weights.is_some_and(|weights| weights != seat.load.weights);
            if mark.excluded || !seat.load.ready || gate.asked_from > now || other_weights {
                self.unavailable.push((seat.node, unavailable(scene, seat, mark)));
                continue;
            }
            let rank = scene.rank(seat, mark);
            let Mark { overlap_tokens, below_tokens, .. } = *mark;
            let raise_ns_per_token = raise_ns_per_token(&seat.load);
            let raise_us = raise_us(below_tokens, raise_ns_per_token);
            let left = ask.prompt_tokens - overlap_tokens;
            let prefill_us = compute_us(left, seat.load.prefill_rate);
            let harm_us = harm_us(prefill_us, streams(&seat.load), scene.config);
            if !rank.other_weights && !rank.suspected {
                let Seat { queue_us, turn_us, .. } = *seat;
                let link = || nodes.link(seat);
                let helper = || Helper {
                    link: link(),
                    queue_us,
                    prefill_us,
                    harm_us,
                    turn_us,
                    below_tokens,
                    raise_ns_per_token,
                };
                self.helpers.offer(seat, overlap_tokens, prefill_us, helper);
            }
            let gaps_us = decode_us(seat.gap_us, ask.output_tokens, scene.config);
            let base_us = gate.hop_us.saturating_add(gaps_us);
            let queued_us = base_us.saturating_add(seat.queue_us);
            let work_us = raise_us.saturating_add(prefill_us).saturating_add(harm_us);
            let here_us = queued_us.saturating_add(work_us);
            if seat.load.kv_bytes_per_token > 0 {
                bytes_per_token = bytes_per_token.min(seat.load.kv_bytes_per_token);
            }
            let place = u32::try_from(place).expect("nodes are fewer");
            self.open.push(Open {
                place,
                overlap_tokens,
                below_tokens,
                rank,
                raise_us,
                prefill_us,
                base_us,
                queued_us,
                here_us,
            });
        }
        self.floors = self.helpers.floors(scene.config, ask.prompt_tokens, bytes_per_token);
    }

    /// The best by the policy, and as many of the cheapest as are remembered, with one more in case the
    /// chosen one is among them.
    fn score(&self, scene: &Scene<'_>) -> Option<(Scored, Kept)> {
        let mut kept: Kept = Least::new(OTHERS_KEPT_MAX + 1);
        let mut best: Option<Scored> = None;
        let floors = self.floors;
        // Nothing is left out where something else than the cost may decide.
        let by_cost = scene.config.policy == Policy::Cost;
        let mut bound = None;
        for open in &self.open {
            if let Some(bound) = bound
                && (open.rank, floors.least_us(open)) > bound
            {
                continue;
            }
            let parts = self.parts(scene, open);
            let key = scene.key(open, &parts);
            let scored = Scored { open: *open, key, parts };
            if best.is_none_or(|best| scene.is_before(&scored, &best)) {
                best = Some(scored);
            }
            kept.offer((open.rank, parts.score_us()), scored);
            bound = kept.bound().filter(|_| by_cost);
        }
        Some((best?, kept))
    }

    /// Another one in place of the best, now and then: any of those that cost little more.
    fn explore(&self, scene: &Scene<'_>, best: &Scored) -> Option<Scored> {
        let Scene { config, ask, .. } = scene;
        let drawn = tie(ask.request, EXPLORATION);
        let first_time = ask.excluded.is_empty() && ask.weights.is_none();
        let is_drawn = drawn % 1000 < u64::from(config.explore_permille);
        if !first_time || !is_drawn || config.policy != Policy::Cost {
            return None;
        }
        let most = best.parts.score_us().saturating_add(micros(config.explore_cost_max));
        let may_be_near = |open: &&Open| {
            let is_other = open.place != best.open.place && open.rank.is_first();
            is_other && self.floors.least_us(open) <= most
        };
        let scored = |open: &Open| {
            let parts = self.parts(scene, open);
            let scored = Scored { open: *open, key: scene.key(open, &parts), parts };
            (parts.score_us() <= most).then_some(scored)
        };
        let near: Vec<Scored> = self.open.iter().filter(may_be_near).filter_map(scored).collect();
        let nth = (drawn / 1000).checked_rem(near.len() as u64)?;
        near.get(usize::try_from(nth).unwrap_or(0)).copied()
    }

    /// The cheapest way of a replica to the prompt's keys and values, and what the answer costs with it.
    fn parts(&self, scene: &Scene<'_>, open: &Open) -> CostParts {
        let Scene { config, ask, .. } = *scene;
        let Open { overlap_tokens: overlap, prefill_us, rank, .. } = *open;
        let seat = scene.seat(open);
        let Gate { hop_us, .. } = *scene.nodes.gate(seat);
        let gaps_us = decode_us(seat.gap_us, ask.output_tokens, config);
        // What comes from elsewhere continues what this replica has, which must be in its pool for that.
        let parts = |path, queue_us, (raised_us, kv_us): (u64, u64), prefill_us, harm_us| {
            let decode_us = gaps_us.saturating_add(harm_us);
            let raise_us = open.raise_us.saturating_add(raised_us);
            CostParts { path, queue_us, raise_us, kv_us, prefill_us, hop_us, decode_us }
        };
        let path = if overlap > 0 { KvPath::Local } else { KvPath::Recompute };
        let harm = |prefill_us| harm_us(prefill_us, streams(&seat.load), config);
        let here = parts(path, seat.queue_us, (0, 0), prefill_us, harm(prefill_us));
        let bytes_per_token = seat.load.kv_bytes_per_token;
        // What is not known to weigh anything cannot be weighed.
        if bytes_per_token == 0 || rank.other_weights {
            return here;
        }
        let link = scene.nodes.link(seat);
        let mut best = here;
        if let Some((from, tokens, helper)) = self.helpers.fetch.other_than(seat.node)
            && *tokens >= overlap + MOVED_TOKENS_MIN
        {
            let way = way(link, helper.link);
            let turns_us = [seat.turn_us, helper.turn_us];
            let kv_us = fetch_us(tokens - overlap, bytes_per_token, way, turns_us);
            let left_us = compute_us(ask.prompt_tokens - tokens, seat.load.prefill_rate);
            let path = KvPath::Fetch { from: *from };
            let from_below = helper.below_tokens.min(tokens - overlap);
            let way_us = (raise_us(from_below, helper.raise_ns_per_token), kv_us);
            let fetched = parts(path, seat.queue_us, way_us, left_us, harm(left_us));
            best = better(best, fetched, here, config);
        }
        let missing = ask.prompt_tokens - overlap;
        if config.disagg != Disagg::Never
            && missing >= MOVED_TOKENS_MIN
            && let Some((by, _, helper)) = self.helpers.prefill.other_than(seat.node)
        {
            let Helper { queue_us, prefill_us, harm_us, .. } = *helper;
            let kv_us = hand_off_us(missing, bytes_per_token, way(link, helper.link), prefill_us)
                .saturating_add(seat.turn_us.saturating_add(helper.turn_us));
            let path = KvPath::Remote { by: *by };
            let raised_us = raise_us(helper.below_tokens, helper.raise_ns_per_token);
            let remote = parts(path, queue_us, (raised_us, kv_us), prefill_us, harm_us);
            best = better(best, remote, here, config);
        }
        best
    }
}

impl Scene<'_> {
    fn seat(&self, open: &Open) -> &Seat {
        &self.model.seats[open.place as usize]
    }

    fn rank(&self, seat: &Seat, mark: &Mark) -> Rank {
        Rank {
            other_weights: Some(seat.load.weights) != self.weights,
            suspected: mark.suspected,
            prefill_only: seat.load.role == NodeRole::Prefill,
            // Simpler policies do not know it.
            overloaded: seat.overloaded && self.config.policy == Policy::Cost,
        }
    }

    /// What the policy goes by, lower is better.
    fn key(&self, open: &Open, parts: &CostParts) -> u64 {
        let seats = self.model.seats.len() as u64;
        match self.config.policy {
            Policy::Cost => parts.score_us(),
            Policy::LeastLoaded => streams(&self.seat(open).load),
            Policy::RoundRobin => (u64::from(open.place) + seats - self.turn % seats) % seats,
            Policy::PrefixOnly => u64::MAX - open.overlap_tokens,
        }
    }

    fn is_before(&self, a: &Scored, b: &Scored) -> bool {
        let key = |scored: &Scored| (scored.open.rank, scored.key);
        let tie = |scored: &Scored| {
            let node = self.seat(&scored.open).node;
            (tie(self.ask.request, node), node)
        };
        key(a) < key(b) || (key(a) == key(b) && tie(a) < tie(b))
    }
}

/// Why a replica is not asked; there is a reason.
fn unavailable(scene: &Scene<'_>, seat: &Seat, mark: &Mark) -> Unavailable {
    if mark.excluded {
        return Unavailable::Tried;
    }
    if !seat.load.ready {
        return Unavailable::NotReady;
    }
    let node = scene.nodes.node(seat.node).expect("a replica is a known node's");
    let unavailable = node.unavailable(scene.now, seat.node == scene.own);
    unavailable.unwrap_or(Unavailable::OtherWeights)
}

fn candidate(scene: &Scene<'_>, scored: &Scored) -> Candidate {
    let Open { overlap_tokens, below_tokens, rank, .. } = scored.open;
    let Seat { node, load, .. } = *scene.seat(&scored.open);
    Candidate { node, load, overlap_tokens, below_tokens, rank, parts: scored.parts }
}

/// The other way if it is cheaper, and by enough than doing it here.
fn better(best: CostParts, other: CostParts, here: CostParts, config: &RouterConfig) -> CostParts {
    let other_us = other.score_us();
    match other_us < best.score_us() && is_gain(here.score_us(), other_us, config) {
        true => other,
        false => best,
    }
}

/// The path between two nodes, of which `None` is this one.
fn way(a: Option<LinkFigures>, b: Option<LinkFigures>) -> LinkFigures {
    match (a, b) {
        (Some(a), Some(b)) => LinkFigures::between(a, b),
        (a, b) => a.or(b).unwrap_or_default(),
    }
}

/// An even spread from ids: SplitMix64's finisher over both.
pub(super) fn tie(request: RequestId, node: NodeId) -> u64 {
    let (words, _) = node.0.as_chunks::<8>();
    let mut mix = (request.0 >> 64) as u64 ^ request.0 as u64;
    for word in words {
        mix ^= u64::from_le_bytes(*word);
        mix = (mix ^ (mix >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mix = (mix ^ (mix >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mix ^= mix >> 31;
    }
    mix
}

/// Stands for no node: makes the draw for exploration another one than that of ties.
const EXPLORATION: NodeId = NodeId([0xa5; 32]);

/// Fewer tokens are not worth a message: a block's.
const MOVED_TOKENS_MIN: u64 = 16;
