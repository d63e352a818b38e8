//! What is known of each node; and for each model a table of its replicas, so that a decision walks along one
//! array and finds there what it reads of every one of them, worked out when it changed.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{Duration, Instant, NodeId, RequestId};

use super::breaker::Breaker;
use super::cost::{compute_us, gap_us, micros, streams, turn_us};
use super::links::LinkFigures;
use super::{ReplicaLoad, RouterConfig, Unavailable};

/// See the module.
#[derive(Debug)]
pub(super) struct Nodes {
    /// This node: no hop, and its path is never down.
    own: NodeId,
    /// Each node's place in the three lists.
    slots: BTreeMap<NodeId, usize>,
    nodes: Vec<Node>,
    gates: Vec<Gate>,
    /// The paths to them; `None`: it is this node.
    links: Vec<Option<LinkFigures>>,
    /// Slots of nodes that were forgotten.
    free: Vec<usize>,
    models: BTreeMap<String, Model>,
}

/// One node.
#[derive(Debug)]
pub(super) struct Node {
    pub path_up: bool,
    pub breaker: Breaker,
    pub busy_until: Instant,
    /// Attempts under way.
    pub sent: BTreeSet<RequestId>,
    reported_at: Instant,
    /// As reported.
    pub replicas: BTreeMap<String, ReplicaLoad>,
    /// Attempts that no report can know of yet.
    unreported: Vec<Sent>,
}

/// An attempt under way.
#[derive(Clone, Debug)]
pub(super) struct Sent {
    pub request: RequestId,
    pub at: Instant,
    pub model: String,
    /// To be computed there.
    pub prompt_tokens: u64,
    /// Who computes the rest of the prompt, as far as this router thinks.
    pub prefilled_by: Option<NodeId>,
}

/// What a decision reads of every node, whatever the model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gate {
    /// It is not asked before. Far off while its path is down.
    pub asked_from: Instant,
    /// There and back, and its share of failures.
    pub hop_us: u64,
}

/// The replicas of one model, in the order of their nodes' ids.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub seats: Vec<Seat>,
    /// Weights of the ready ones, and how many have them.
    pub ready: BTreeMap<u64, usize>,
}

/// A replica of a model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seat {
    pub node: NodeId,
    slot: usize,
    /// As reported, with what was sent there since.
    pub load: ReplicaLoad,
    /// Until a prompt that is sent now is begun.
    pub queue_us: u64,
    /// Of each token of an answer, with what it adds to its neighbours'.
    pub gap_us: u64,
    /// Until it hears who wants blocks of it, or brings it some.
    pub turn_us: u64,
    /// It has more to do than it can begin soon.
    pub overloaded: bool,
}

impl Nodes {
    pub fn new(own: NodeId) -> Self {
        Nodes {
            own,
            slots: BTreeMap::new(),
            nodes: Vec::new(),
            gates: Vec::new(),
            links: Vec::new(),
            free: Vec::new(),
            models: BTreeMap::new(),
        }
    }

    pub fn node(&self, id: NodeId) -> Option<&Node> {
        Some(&self.nodes[*self.slots.get(&id)?])
    }

    /// Each of them, in the order of their ids.
    pub fn all(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        self.slots.iter().map(|(&id, &slot)| (id, &self.nodes[slot]))
    }

    /// The replicas of a model; `None` if no node has it.
    pub fn model(&self, name: &str) -> Option<&Model> {
        self.models.get(name)
    }

    pub fn models(&self) -> impl Iterator<Item = (&str, &Model)> {
        self.models.iter().map(|(name, model)| (name.as_str(), model))
    }

    pub fn gate(&self, seat: &Seat) -> &Gate {
        &self.gates[seat.slot]
    }

    /// The path to a replica's node; `None`: it is this node.
    pub fn link(&self, seat: &Seat) -> Option<LinkFigures> {
        self.links[seat.slot]
    }

    pub fn link_to(&self, id: NodeId) -> LinkFigures {
        let slot = self.slots.get(&id);
        slot.and_then(|&slot| self.links[slot]).unwrap_or_default()
    }

    /// All replicas of a node; those not named are gone.
    pub fn report(
        &mut self,
        config: &RouterConfig,
        now: Instant,
        id: NodeId,
        replicas: BTreeMap<String, ReplicaLoad>,
    ) {
        let slot = self.slot(config, id);
        let node = &mut self.nodes[slot];
        node.reported_at = now;
        let known_before = node.known_before(config);
        node.unreported.retain(|sent| sent.at >= known_before);
        let before = std::mem::replace(&mut node.replicas, replicas);
        for name in before.into_keys() {
            if !self.nodes[slot].replicas.contains_key(&name) {
                self.remove_seat(&name, id);
            }
        }
        let node = &self.nodes[slot];
        for (name, load) in &node.replicas {
            let model = match self.models.get_mut(name) {
                Some(model) => model,
                None => self.models.entry(name.clone()).or_default(),
            };
            let since = node.sent_since_report(config, name);
            model.put(Seat::new(id, slot, *load, since, config));
        }
    }

    /// Nothing is remembered of a node.
    pub fn forget(&mut self, id: NodeId) {
        let Some(slot) = self.slots.remove(&id) else { return };
        for model in std::mem::take(&mut self.nodes[slot].replicas).into_keys() {
            self.remove_seat(&model, id);
        }
        self.free.push(slot);
    }

    /// Changes what decides whether a node can be asked. Nothing happens to an unknown one.
    pub fn change(&mut self, id: NodeId, change: impl FnOnce(&mut Node)) {
        let Some(&slot) = self.slots.get(&id) else { return };
        let node = &mut self.nodes[slot];
        change(node);
        self.gates[slot].asked_from = node.asked_from(id == self.own);
    }

    /// Changes what is known of the path to a node. Nothing happens to this node's or an unknown one's.
    pub fn change_link(
        &mut self,
        config: &RouterConfig,
        id: NodeId,
        change: impl FnOnce(&mut LinkFigures),
    ) {
        let Some(&slot) = self.slots.get(&id) else { return };
        if let Some(link) = &mut self.links[slot] {
            change(link);
            self.gates[slot].hop_us = hop_us(Some(*link), config);
        }
    }

    /// Counts an attempt that no report can know of yet; at most [`SENT_PER_NODE_MAX`].
    pub fn count_sent(&mut self, config: &RouterConfig, id: NodeId, sent: Sent) {
        let Some(&slot) = self.slots.get(&id) else { return };
        let node = &mut self.nodes[slot];
        if node.unreported.len() < SENT_PER_NODE_MAX {
            let model = sent.model.clone();
            node.unreported.push(sent);
            self.recount(config, id, &model);
        }
    }

    /// Counts it no more, and gives what it was.
    pub fn uncount(
        &mut self,
        config: &RouterConfig,
        id: NodeId,
        request: RequestId,
    ) -> Option<Sent> {
        let node = &mut self.nodes[*self.slots.get(&id)?];
        let place = node.unreported.iter().position(|sent| sent.request == request)?;
        let sent = node.unreported.swap_remove(place);
        self.recount(config, id, &sent.model);
        Some(sent)
    }

    fn recount(&mut self, config: &RouterConfig, id: NodeId, name: &str) {
        let Some(model) = self.models.get_mut(name) else { return };
        if let Ok(place) = model.place(id) {
            let slot = model.seats[place].slot;
            let node = &self.nodes[slot];
            let since = node.sent_since_report(config, name);
            model.seats[place] = Seat::new(id, slot, node.replicas[name], since, config);
        }
    }

    fn slot(&mut self, config: &RouterConfig, id: NodeId) -> usize {
        if let Some(&slot) = self.slots.get(&id) {
            return slot;
        }
        let link = (id != self.own).then(LinkFigures::default);
        let gate = Gate { asked_from: Instant::ORIGIN, hop_us: hop_us(link, config) };
        let node = Node::new(config);
        let slot = match self.free.pop() {
            Some(slot) => {
                (self.nodes[slot], self.gates[slot], self.links[slot]) = (node, gate, link);
                slot
            }
            None => {
                self.nodes.push(node);
                self.gates.push(gate);
                self.links.push(link);
                self.nodes.len() - 1
            }
        };
        self.slots.insert(id, slot);
        slot
    }

    fn remove_seat(&mut self, name: &str, id: NodeId) {
        let Some(model) = self.models.get_mut(name) else { return };
        model.remove(id);
        if model.seats.is_empty() {
            self.models.remove(name);
        }
    }
}

impl Node {
    fn new(config: &RouterConfig) -> Self {
        Node {
            path_up: true,
            breaker: Breaker::new(config),
            busy_until: Instant::ORIGIN,
            sent: BTreeSet::new(),
            reported_at: Instant::ORIGIN,
            replicas: BTreeMap::new(),
            unreported: Vec::new(),
        }
    }

    /// What was sent before this is in the last report.
    fn known_before(&self, config: &RouterConfig) -> Instant {
        let lag = u64::try_from(config.report_lag.as_nanos()).unwrap_or(u64::MAX);
        Instant::from_nanos(self.reported_at.as_nanos().saturating_sub(lag))
    }

    /// Requests for a model that the last report cannot know of, and the prompt tokens to compute for
    /// them.
    fn sent_since_report(&self, config: &RouterConfig, model: &str) -> (u32, u64) {
        let known_before = self.known_before(config);
        let since = self.unreported.iter();
        let since = since.filter(|sent| sent.at >= known_before && sent.model == model);
        since.fold((0, 0), |(sequences, tokens): (u32, u64), sent| {
            (sequences.saturating_add(1), tokens.saturating_add(sent.prompt_tokens))
        })
    }

    fn asked_from(&self, own: bool) -> Instant {
        match own || self.path_up {
            true => self.breaker.asked_from().max(self.busy_until),
            false => Instant::from_nanos(u64::MAX),
        }
    }

    /// Why it is not asked before its gate's time.
    pub fn unavailable(&self, now: Instant, own: bool) -> Option<Unavailable> {
        if !own && !self.path_up {
            return Some(Unavailable::PathDown);
        }
        let left = |until: Instant| {
            let left = until.saturating_since(now);
            (left > Duration::ZERO).then_some(left)
        };
        let failing = |retry_after| Unavailable::Failing { retry_after };
        let busy = |retry_after| Unavailable::Busy { retry_after };
        left(self.breaker.asked_from()).map(failing).or_else(|| left(self.busy_until).map(busy))
    }
}

impl Model {
    /// Where a node's replica is, or would be.
    pub fn place(&self, id: NodeId) -> Result<usize, usize> {
        self.seats.binary_search_by(|seat| seat.node.cmp(&id))
    }

    fn put(&mut self, seat: Seat) {
        match self.place(seat.node) {
            Ok(place) => {
                let before = std::mem::replace(&mut self.seats[place], seat);
                self.count(&before.load, false);
            }
            Err(place) => self.seats.insert(place, seat),
        }
        self.count(&seat.load, true);
    }

    fn remove(&mut self, id: NodeId) {
        if let Ok(place) = self.place(id) {
            let seat = self.seats.remove(place);
            self.count(&seat.load, false);
        }
    }

    /// Counts the weights of a replica, or counts them no more.
    fn count(&mut self, load: &ReplicaLoad, is_there: bool) {
        if !load.ready {
            return;
        }
        let count = self.ready.entry(load.weights).or_default();
        match is_there {
            true => *count += 1,
            false => *count -= 1,
        }
        if *count == 0 {
            self.ready.remove(&load.weights);
        }
    }
}

impl Seat {
    fn new(
        node: NodeId,
        slot: usize,
        reported: ReplicaLoad,
        (sent, sent_tokens): (u32, u64),
        config: &RouterConfig,
    ) -> Seat {
        let load = ReplicaLoad {
            waiting: reported.waiting.saturating_add(sent),
            prompt_tokens: reported.prompt_tokens.saturating_add(sent_tokens),
            ..reported
        };
        let queue_us = compute_us(load.prompt_tokens, load.prefill_rate);
        let crowded = load.kv_blocks > 0
            && load.waiting > 0
            && load.kv_blocks_free < load.kv_blocks / KV_FREE_SHARE_MIN;
        let overloaded = crowded || queue_us > micros(config.queue_max);
        let gap_us = gap_us(load.decode_step_us, streams(&load), config);
        let turn_us = turn_us(&load, config);
        Seat { node, slot, load, queue_us, gap_us, turn_us, overloaded }
    }
}

fn hop_us(link: Option<LinkFigures>, config: &RouterConfig) -> u64 {
    let hop = |link: LinkFigures| config.hop_cost.saturating_add(link.rtt.unwrap_or_default());
    link.map_or(0, |link| micros(hop(link)))
}

/// Attempts counted for one node; beyond it, more are sent and not counted.
pub const SENT_PER_NODE_MAX: usize = 65_536;
/// A replica on which sequences wait while less than this part of its blocks is free (one of so many)
/// cannot begin more.
const KV_FREE_SHARE_MIN: u32 = 16;
