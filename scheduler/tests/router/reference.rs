//! The router against the plain way to the same decision: everybody is looked at, everything is worked out,
//! and all of it is sorted. What the router leaves out and keeps at hand must not show.

use super::*;
use protocol::node_record::NodeRole;
use protocol::random::Random;
use scheduler::router::{
    Candidate, CostParts, Decided, Disagg, KvPath, LinkFigures, OTHERS_KEPT_MAX, Rank,
    ReplicaDecision, Why,
};

/// What the router was told of one node.
#[derive(Default)]
struct Known {
    load: Option<ReplicaLoad>,
    path_down: bool,
    busy_until: u64,
    link: LinkFigures,
    /// Prompt tokens of what was sent there since its report.
    sent: Vec<(u128, u64)>,
}

struct Plain {
    config: RouterConfig,
    nodes: BTreeMap<NodeId, Known>,
    /// Who computes the prompt of a request that went elsewhere.
    helper: BTreeMap<u128, NodeId>,
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}

fn compute_us(tokens: u64, rate: u32) -> u64 {
    tokens * 1_000_000 / u64::from(if rate == 0 { 200 } else { rate })
}

fn streams(load: &ReplicaLoad) -> u64 {
    u64::from(load.running) + u64::from(load.waiting)
}

impl Plain {
    /// What is thought of a node's replica now.
    fn load(&self, node: NodeId) -> Option<ReplicaLoad> {
        let known = &self.nodes[&node];
        let mut load = known.load?;
        load.waiting += known.sent.len() as u32;
        load.prompt_tokens += known.sent.iter().map(|(_, tokens)| tokens).sum::<u64>();
        Some(load)
    }

    fn unavailable(&self, now: u64, node: NodeId, ask: &Ask<'_>) -> Option<Unavailable> {
        let known = &self.nodes[&node];
        let load = self.load(node)?;
        let busy = known.busy_until.saturating_sub(now);
        if ask.excluded.contains(&node) {
            Some(Unavailable::Tried)
        } else if !load.ready {
            Some(Unavailable::NotReady)
        } else if node != OWN && known.path_down {
            Some(Unavailable::PathDown)
        } else if busy > 0 {
            Some(Unavailable::Busy { retry_after: Duration::from_millis(busy) })
        } else {
            (ask.weights.is_some_and(|weights| weights != load.weights))
                .then_some(Unavailable::OtherWeights)
        }
    }

    fn weights(&self) -> Option<u64> {
        let ready = |node| self.load(node).filter(|load| load.ready).map(|load| load.weights);
        let own = self.nodes.contains_key(&OWN).then(|| ready(OWN)).flatten();
        let mut counts = BTreeMap::new();
        for weights in self.nodes.keys().filter_map(|&node| ready(node)) {
            *counts.entry(weights).or_insert(0) += 1;
        }
        let most = counts.iter().max_by_key(|&(&weights, &n)| (n, std::cmp::Reverse(weights)));
        own.or(most.map(|(&weights, _)| weights))
    }

    fn decide(&self, now: u64, ask: &Ask<'_>) -> ReplicaDecision {
        let weights = ask.weights.or_else(|| self.weights());
        let (mut candidates, mut unavailable) = (Vec::new(), Vec::new());
        for &node in self.nodes.keys() {
            let Some(load) = self.load(node) else { continue };
            match self.unavailable(now, node, ask) {
                Some(why) => unavailable.push((node, why)),
                None => candidates.push(self.seen(node, load, ask, weights)),
            }
        }
        for place in 0..candidates.len() {
            candidates[place].parts = self.parts(&candidates, place, ask);
        }
        let score = |c: &Candidate| c.parts.score_us();
        let first = (0..candidates.len()).min_by_key(|&place| {
            let c = &candidates[place];
            (c.rank, score(c), tie(ask.request, c.node), c.node)
        });
        let mut chosen = first;
        let mut why = match first {
            None => Why::Nobody,
            Some(first) if !candidates[first].rank.is_first() => Why::LastResort,
            Some(_) if candidates.len() == 1 => Why::Only,
            Some(_) => Why::Cheapest,
        };
        let drawn = tie(ask.request, NodeId([0xa5; 32]));
        let is_drawn = drawn % 1000 < u64::from(self.config.explore_permille);
        if let Some(first) = first.filter(|_| why == Why::Cheapest && is_drawn)
            && ask.excluded.is_empty()
            && ask.weights.is_none()
        {
            let most = score(&candidates[first]) + micros(self.config.explore_cost_max);
            let is_near = |place: &usize| {
                let c = &candidates[*place];
                *place != first && c.rank.is_first() && score(c) <= most
            };
            let near: Vec<usize> = (0..candidates.len()).filter(is_near).collect();
            if !near.is_empty() {
                chosen = Some(near[(drawn / 1000) as usize % near.len()]);
                why = Why::Explored;
            }
        }
        let chosen = chosen.map(|place| candidates.remove(place));
        let others_total = candidates.len();
        candidates.sort_by_key(|c| (c.rank, score(c), c.node));
        candidates.truncate(OTHERS_KEPT_MAX);
        unavailable.truncate(OTHERS_KEPT_MAX);
        ReplicaDecision {
            model: ask.model.to_owned(),
            prompt_tokens: ask.prompt_tokens,
            output_tokens: ask.output_tokens,
            chosen,
            why,
            others: candidates,
            others_total,
            unavailable,
        }
    }

    fn seen(
        &self,
        node: NodeId,
        load: ReplicaLoad,
        ask: &Ask<'_>,
        weights: Option<u64>,
    ) -> Candidate {
        let queue_us = compute_us(load.prompt_tokens, load.prefill_rate);
        let crowded = load.waiting > 0 && load.kv_blocks_free < load.kv_blocks / 16;
        let overlap = ask.overlap_tokens.get(&node).copied().unwrap_or(0);
        let path = KvPath::Recompute;
        Candidate {
            node,
            load,
            overlap_tokens: overlap.min(ask.prompt_tokens - 1),
            below_tokens: {
                let below = ask.below_tokens.get(&node).copied().unwrap_or(0);
                below.min(overlap).min(ask.prompt_tokens - 1)
            },
            rank: Rank {
                other_weights: Some(load.weights) != weights,
                suspected: ask.suspected.contains(&node),
                prefill_only: load.role == NodeRole::Prefill,
                overloaded: crowded || queue_us > micros(self.config.queue_max),
            },
            parts: CostParts {
                path,
                queue_us,
                raise_us: 0,
                kv_us: 0,
                prefill_us: 0,
                hop_us: 0,
                decode_us: 0,
            },
        }
    }

    /// Docs/routing.md, line by line.
    fn parts(&self, candidates: &[Candidate], place: usize, ask: &Ask<'_>) -> CostParts {
        let config = &self.config;
        let c = &candidates[place];
        let step = match c.load.decode_step_us {
            0 => micros(config.step_guess),
            us => u64::from(us),
        };
        let added = step * u64::from(config.stream_share_percent) / 100;
        let gaps = (step + added * (streams(&c.load) + 1)) * ask.output_tokens;
        let weighed = |us: u64| us * u64::from(config.decode_weight_percent) / 100;
        let hop_us = match c.node == OWN {
            true => 0,
            false => micros(config.hop_cost + self.nodes[&c.node].link.rtt.unwrap_or_default()),
        };
        let raise = |o: &Candidate, tokens: u64| {
            let ns = match o.load.below_ns_per_token {
                0 => u64::from(o.load.kv_bytes_per_token) * 2,
                ns => u64::from(ns),
            };
            o.below_tokens.min(tokens) * ns.min(compute_us(1_000, o.load.prefill_rate)) / 1_000
        };
        let own_raise = raise(c, u64::MAX);
        let parts = |path, queue_us, (raised, kv_us), prefill_us, beside: u64| CostParts {
            path,
            queue_us,
            raise_us: own_raise + raised,
            kv_us,
            prefill_us,
            hop_us,
            decode_us: weighed(gaps) + weighed(prefill_us * beside),
        };
        let queue_us = |c: &Candidate| compute_us(c.load.prompt_tokens, c.load.prefill_rate);
        let own_prefill =
            |c: &Candidate| compute_us(ask.prompt_tokens - c.overlap_tokens, c.load.prefill_rate);
        let path = if c.overlap_tokens > 0 { KvPath::Local } else { KvPath::Recompute };
        let here = parts(path, queue_us(c), (0, 0), own_prefill(c), streams(&c.load));
        if c.load.kv_bytes_per_token == 0 || c.rank.other_weights {
            return here;
        }
        let link = |node: NodeId| (node != OWN).then(|| self.nodes[&node].link);
        let way = |other: NodeId| match (link(c.node), link(other)) {
            (Some(a), Some(b)) => LinkFigures::between(a, b),
            (a, b) => a.or(b).unwrap(),
        };
        let transfer = |tokens: u64, way: LinkFigures| {
            let bytes = tokens * u64::from(c.load.kv_bytes_per_token);
            bytes * 1_000_000 / way.bytes_per_s_or_guess()
        };
        let turn = |load: &ReplicaLoad| match (streams(load), load.decode_step_us) {
            (0, _) => 0,
            (_, 0) => micros(config.step_guess),
            (_, us) => u64::from(us),
        };
        let mut ways = vec![here];
        let is_well =
            |o: &&Candidate| o.node != c.node && !o.rank.other_weights && !o.rank.suspected;
        // Of equals the first: `max_by_key` would take the last.
        let others = || candidates.iter().rev().filter(is_well);
        if let Some(most) = others().max_by_key(|o| o.overlap_tokens)
            && most.overlap_tokens >= c.overlap_tokens + 16
        {
            let way = way(most.node);
            let moved = most.overlap_tokens - c.overlap_tokens;
            let chunks = (moved * u64::from(c.load.kv_bytes_per_token)).div_ceil(1 << 20);
            let turns = chunks * turn(&c.load).max(turn(&most.load));
            let kv = transfer(moved, way).max(turns) + micros(way.rtt_or_guess());
            let kv = kv + turn(&c.load) + turn(&most.load);
            let left = compute_us(ask.prompt_tokens - most.overlap_tokens, c.load.prefill_rate);
            let path = KvPath::Fetch { from: most.node };
            let kv = (raise(most, moved), kv);
            ways.push(parts(path, queue_us(c), kv, left, streams(&c.load)));
        }
        let missing = ask.prompt_tokens - c.overlap_tokens;
        let able = |o: &&Candidate| o.load.role != NodeRole::Decode && !o.rank.overloaded;
        let done = |o: &&Candidate| queue_us(o) + own_prefill(o);
        if config.disagg != Disagg::Never
            && missing >= 16
            && let Some(by) = candidates.iter().filter(is_well).filter(able).min_by_key(done)
        {
            let way = way(by.node);
            let prefill = own_prefill(by);
            let kv = transfer(missing, way).saturating_sub(prefill);
            let kv = kv.max(transfer(missing.min(512), way)) + micros(way.rtt_or_guess()) + 2_000;
            let kv = kv + turn(&c.load) + turn(&by.load);
            let path = KvPath::Remote { by: by.node };
            let kv = (raise(by, u64::MAX), kv);
            ways.push(parts(path, queue_us(by), kv, prefill, streams(&by.load)));
        }
        let gain =
            micros(config.gain_min).max(here.score_us() / 100 * u64::from(config.gain_min_percent));
        let is_gain =
            |way: &&CostParts| way.path == here.path || way.score_us() + gain < here.score_us();
        *ways.iter().filter(is_gain).min_by_key(|way| way.score_us()).unwrap()
    }

    /// Counts a choice as the router must.
    fn sent(&mut self, ask: &Ask<'_>, chosen: &Candidate) {
        let overlap = |node| ask.overlap_tokens.get(&node).copied().unwrap_or(0);
        let request = ask.request.0;
        let tokens = match chosen.parts.path {
            KvPath::Recompute | KvPath::Local => ask.prompt_tokens - chosen.overlap_tokens,
            KvPath::Fetch { from } => ask.prompt_tokens.saturating_sub(overlap(from)),
            KvPath::Remote { by } => {
                let tokens = ask.prompt_tokens.saturating_sub(overlap(by));
                self.nodes.get_mut(&by).unwrap().sent.push((request, tokens));
                self.helper.insert(request, by);
                0
            }
        };
        self.nodes.get_mut(&chosen.node).unwrap().sent.push((request, tokens));
    }
}

/// As the router breaks ties.
fn tie(request: RequestId, node: NodeId) -> u64 {
    let mut mix = (request.0 >> 64) as u64 ^ request.0 as u64;
    for word in node.0.chunks_exact(8) {
        mix ^= u64::from_le_bytes(word.try_into().unwrap());
        mix = protocol::random::mix(mix);
    }
    mix
}

/// Few different values, so that ties come up; and now and then something odd.
fn drawn_load(random: &mut Random) -> ReplicaLoad {
    let mut of = |values: &[u64]| values[random.below(values.len())];
    ReplicaLoad {
        ready: of(&[1, 1, 1, 1, 0]) == 1,
        running: of(&[0, 0, 1, 3, 12]) as u32,
        waiting: of(&[0, 0, 0, 2]) as u32,
        prompt_tokens: of(&[0, 0, 300, 2_000, 40_000]),
        prefill_rate: of(&[0, 150, 1_000, 1_000, 7_321]) as u32,
        weights: of(&[7, 7, 7, 7, 7, 8]),
        decode_step_us: of(&[0, 20_000, 20_000, 3_456]) as u32,
        kv_bytes_per_token: of(&[0, 12_288, 12_288, 12_288]) as u32,
        below_ns_per_token: of(&[0, 60_000, 900_000, 9_000_000]) as u32,
        kv_blocks_free: of(&[10, 900]) as u32,
        kv_blocks: 1_000,
        role: NodeRole::ALL[of(&[0, 0, 0, 1, 2]) as usize],
    }
}

fn run(seed: u64) {
    let mut random = Random::new(seed);
    let config = RouterConfig {
        disagg: Disagg::ALL[random.below(3)],
        explore_permille: [0, 15, 500][random.below(3)],
        ..RouterConfig::default()
    };
    let mut router = Router::new(OWN, config.clone());
    let mut plain = Plain { config, nodes: BTreeMap::new(), helper: BTreeMap::new() };
    let size = [3, 12, 60][random.below(3)];
    let nodes = 1 + random.below(size);
    let mut running: Vec<(NodeId, u128)> = Vec::new();
    for turn in 0..40u64 {
        let now = 1_000 + turn * 100;
        for _ in 0..[nodes, 2][usize::from(turn > 0)] {
            let node = node(random.below(nodes) as u8);
            change(&mut router, &mut plain, &mut random, now, node);
        }
        if random.below(2) == 0 && !running.is_empty() {
            let (node, request) = running.swap_remove(random.below(running.len()));
            settle(&mut router, &mut plain, &mut random, now, node, request);
        }
        let some = |random: &mut Random, one_in: usize| -> Vec<NodeId> {
            (0..nodes as u8).filter(|_| random.below(one_in) == 0).map(node).collect()
        };
        let prompt_tokens = [1, 16, 100, 2_000][random.below(4)];
        let overlap = some(&mut random, 4);
        let overlap: BTreeMap<NodeId, u64> =
            overlap.into_iter().map(|id| (id, [16, 500, 1_999, 2_500][random.below(4)])).collect();
        let below: BTreeMap<NodeId, u64> = some(&mut random, 4)
            .into_iter()
            .map(|id| (id, [16, 400, 1_999, 9_999][random.below(4)]))
            .collect();
        let rarely = random.below(6) == 0;
        let (excluded, suspected) = match rarely {
            true => (some(&mut random, 3), some(&mut random, 3)),
            false => (Vec::new(), Vec::new()),
        };
        let request = u128::from(random.next_u64()) << 64 | u128::from(turn);
        let ask = Ask {
            prompt_tokens,
            overlap_tokens: &overlap,
            below_tokens: &below,
            excluded: &excluded,
            suspected: &suspected,
            weights: (random.below(8) == 0).then_some([7, 8, 9][random.below(3)]),
            ..ask(request)
        };
        let choice = router.choose(at(now), &ask);
        let expect = plain.decide(now, &ask);
        let kept = router.decisions().of(ask.request).last().map(|kept| &kept.what);
        if plain.nodes.values().all(|known| known.load.is_none()) {
            assert_eq!((choice, kept), (Err(NoReplica::UnknownModel), None));
            continue;
        }
        assert_eq!(kept, Some(&Decided::Replica(expect.clone())), "seed {seed}, turn {turn}");
        if let Some(chosen) = expect.chosen {
            assert_eq!(choice.unwrap().node, chosen.node);
            plain.sent(&ask, &chosen);
            running.push((chosen.node, request));
        }
    }
}

/// Something becomes known of a node.
fn change(router: &mut Router, plain: &mut Plain, random: &mut Random, now: u64, id: NodeId) {
    let is_new = !plain.nodes.contains_key(&id);
    match random.below(8) {
        0 if !is_new => {
            router.forget(id);
            plain.nodes.remove(&id);
        }
        1 if !is_new => {
            let up = random.below(2) == 0;
            router.path(id, up);
            plain.nodes.get_mut(&id).unwrap().path_down = !up;
        }
        2 if !is_new && id != OWN => {
            let ms = [1, 1, 40][random.below(3)];
            router.rtt(id, Duration::from_millis(ms));
            router.carried(id, 1 << 30, Duration::from_secs(ms));
            let link = &mut plain.nodes.get_mut(&id).unwrap().link;
            link.rtt = Some(Duration::from_millis(ms));
            link.carried(1 << 30, Duration::from_secs(ms));
        }
        what => {
            let load = drawn_load(random);
            let has = what != 3;
            let other = ("other".to_owned(), load);
            router.report(
                at(now),
                id,
                has.then(|| ("m".to_owned(), load)).into_iter().chain([other]),
            );
            let known = plain.nodes.entry(id).or_default();
            known.load = has.then_some(load);
            // Turns are a fifth of the lag apart: what was sent at the last five is not in the report.
            let first = (now - 500).saturating_sub(1_000) / 100;
            known.sent.retain(|(request, _)| u64::from(*request as u32) >= first);
        }
    }
}

/// A request ends, or is refused.
fn settle(
    router: &mut Router,
    plain: &mut Plain,
    random: &mut Random,
    now: u64,
    id: NodeId,
    request: u128,
) {
    let retry_after = Duration::from_millis(250);
    let refused = random.below(3) == 0;
    let outcome = if refused { Outcome::Refused { retry_after } } else { Outcome::Ended };
    router.settle(at(now), id, RequestId(request), outcome);
    let Some(known) = plain.nodes.get_mut(&id) else { return };
    if refused {
        known.busy_until = now + 250;
    }
    let before = known.sent.len();
    known.sent.retain(|(sent, _)| *sent != request);
    let was_counted = known.sent.len() < before;
    let helper = plain.helper.remove(&request).filter(|_| was_counted);
    if let Some(helper) = helper.and_then(|helper| plain.nodes.get_mut(&helper)) {
        helper.sent.retain(|(sent, _)| *sent != request);
    }
}

#[test]
fn it_decides_as_the_plain_way_does() {
    (0..1_500).for_each(run);
}
