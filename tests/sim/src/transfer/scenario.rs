//! Worlds in which blocks are handed over: from a seed with mixed faults, and one hand-off with one fault
//! at each of its events.

use std::cell::Cell;
use std::rc::Rc;

use protocol::random::Random;
use protocol::transfer::KvDtype;
use protocol::{Duration, RequestId, TenantId, TokenId};

use super::ledger::{Counts, Fate, Ledger};
use super::model::{Model, Prompt};
use super::node::{Command, KvNode, NodeSetup, Sabotage};
use crate::actor::NodeIndex;
use crate::fault::{DiskFate, Fault, Nodes, apply};
use crate::net::Links;
use crate::world::{Step, World};

/// Something that happens to the world from outside.
#[derive(Clone, Debug)]
pub enum Action {
    Fault(Fault),
    Command {
        node: NodeIndex,
        command: Command,
    },
    /// No more hiccups, no more payloads that change on their way.
    Calm,
}

#[derive(Clone, Debug)]
pub struct PlannedAction {
    pub at_ms: f64,
    pub action: Action,
}

/// A world, and all that will happen to it.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub links: Links,
    pub setups: Vec<NodeSetup>,
    pub actions: Vec<PlannedAction>,
    /// Requests after everything is healed, each of which must get all its blocks from a peer.
    pub proofs: Vec<RequestId>,
    pub end_ms: f64,
}

/// What a run has left behind.
#[derive(Debug)]
pub struct Outcome {
    /// What must not happen, and did.
    pub broken: Vec<String>,
    pub counts: Counts,
    pub fates: Vec<(RequestId, Option<Fate>)>,
    pub events: u64,
    pub transcript: Option<Vec<u8>>,
}

/// A fault of the exhaustive run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventFault {
    KillReceiver,
    KillSender,
    /// Killed and started again at once.
    BounceReceiver,
    BounceSender,
    /// Shorter than any deadline, and longer than every one.
    BlinkReceiver,
    BlinkSender,
    StallReceiver,
    StallSender,
    Cancel,
    /// One way only.
    MuteReceiver,
    MuteSender,
    Cut,
}

pub const EVENT_FAULTS: [EventFault; 12] = [
    EventFault::KillReceiver,
    EventFault::KillSender,
    EventFault::BounceReceiver,
    EventFault::BounceSender,
    EventFault::BlinkReceiver,
    EventFault::BlinkSender,
    EventFault::StallReceiver,
    EventFault::StallSender,
    EventFault::Cancel,
    EventFault::MuteReceiver,
    EventFault::MuteSender,
    EventFault::Cut,
];

/// A fault after so many events of the hand-off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventFaultAt {
    pub event: u64,
    pub fault: EventFault,
    /// Whom the fault takes for the sender: 1 is asked first, 2 if that fails.
    pub sender: NodeIndex,
}

/// Every fault at every event of a hand-off; and, with `again`, after a first one that made the receiver
/// turn to its second source, every fault at every later event.
pub fn event_faults(seed: u64, again: bool) -> Vec<Vec<EventFaultAt>> {
    let mut all = Vec::new();
    let mut after = |before: &[EventFaultAt], from: u64, sender| {
        for event in from..=events_of_hand_off(seed, before) {
            for fault in EVENT_FAULTS {
                all.push([before, &[EventFaultAt { event, fault, sender }]].concat());
            }
        }
    };
    after(&[], 0, 1);
    if again {
        for fault in [EventFault::KillSender, EventFault::BounceSender, EventFault::MuteSender] {
            // When it has sent some blocks, and not all.
            let first = EventFaultAt { event: 40, fault, sender: 1 };
            after(&[first], first.event, 2);
        }
    }
    all
}

impl Plan {
    /// Some nodes, some tenants with prompts that begin alike, hand-offs and cancellations, and random
    /// faults for five seconds; then all is healed, and peers must be of use again.
    pub fn mixed(seed: u64, sabotage: Option<Sabotage>) -> Self {
        Mixer::new(seed, sabotage).plan()
    }

    fn world(&self, ledger: &Ledger) -> World<KvNode> {
        let (setups, ledger) = (self.setups.clone(), ledger.clone());
        let make = move |birth: crate::world::Birth| {
            KvNode::new(setups[birth.node as usize].clone(), ledger.clone(), birth)
        };
        let mut world = World::new(self.seed, self.setups.len(), self.links.clone(), make);
        for node in 0..self.setups.len() as NodeIndex {
            world.start(node, Vec::new());
        }
        for (number, planned) in (0..).zip(&self.actions) {
            world.plan_fault(nanos(planned.at_ms), number);
        }
        world
    }

    /// Runs it to its end, or until something happens that must not.
    pub fn run(&self, keep_transcript: bool) -> Outcome {
        let ledger = Ledger::default();
        let mut world = self.world(&ledger);
        world.transcript = keep_transcript.then(Vec::new);
        self.finish(world, &ledger)
    }

    fn finish(&self, mut world: World<KvNode>, ledger: &Ledger) -> Outcome {
        let end = nanos(self.end_ms);
        while ledger.is_sound() {
            match world.step(end) {
                Step::Ran => {}
                Step::Fault(number) => {
                    self.act(&mut world, ledger, &self.actions[number as usize].action);
                }
                Step::Idle => break,
            }
        }
        let mut broken = ledger.take_broken();
        if broken.is_empty() {
            broken = self.judge(&world, ledger);
        }
        Outcome {
            broken,
            counts: ledger.counts(),
            fates: ledger.fates().into_iter().collect(),
            events: world.events,
            transcript: world.transcript,
        }
    }

    fn act(&self, world: &mut World<KvNode>, ledger: &Ledger, action: &Action) {
        world.seen.clear();
        match action {
            Action::Fault(fault) => {
                apply(world, fault, &[]);
                for (node, host) in (0..).zip(&world.nodes) {
                    if host.actor.is_none() {
                        ledger.died(node);
                    }
                }
            }
            Action::Command { node, command } => {
                if let Some(actor) = &mut world.nodes[*node as usize].actor {
                    actor.command(command.clone());
                    world.schedule_wake(*node);
                }
            }
            Action::Calm => self.setups.iter().for_each(|setup| setup.trouble.set(0.0)),
        }
        if let Err(why) = crate::oracle::bounds_hold(world) {
            ledger.broken(0, format_args!("{why}"));
        }
    }

    /// What must hold at the end, when nothing goes on any more.
    fn judge(&self, world: &World<KvNode>, ledger: &Ledger) -> Vec<String> {
        let mut broken = Vec::new();
        for node in world.up() {
            let actor = world.nodes[node as usize].actor.as_ref().expect("it is up");
            broken.extend(actor.leftovers());
        }
        let fates = ledger.fates();
        let waiting = fates.iter().filter(|(_, fate)| fate.is_none());
        broken.extend(waiting.map(|(request, _)| format!("{request} waits for ever")));
        for proof in &self.proofs {
            let fate = fates.get(proof).copied().flatten();
            if !matches!(fate, Some(Fate::Right { fetched: 1.., prefilled: 0 })) {
                broken.push(format!("{proof} after the heal: {fate:?}"));
            }
        }
        broken
    }
}

/// The events of one hand-off, from its beginning to the end of its request, with these faults.
pub fn events_of_hand_off(seed: u64, faults: &[EventFaultAt]) -> u64 {
    let plan = one_hand_off(seed, 9, [true, true]);
    let ledger = Ledger::default();
    let mut world = plan.world(&ledger);
    let before = begin_hand_off(&plan, &mut world, &ledger);
    for fault in faults {
        fault.happen(&plan, &mut world, &ledger, before);
    }
    while ledger.fates().get(&HAND_OFF).copied().flatten().is_none() {
        assert!(world.step(nanos(HEAL_MS)) == Step::Ran, "the hand-off ends");
    }
    world.events - before
}

/// The hand-off with these faults, in order of their events; then healed, and another one.
pub fn with_faults(seed: u64, faults: &[EventFaultAt], keep_transcript: bool) -> Outcome {
    let plan = one_hand_off(seed, 9, [true, true]);
    let ledger = Ledger::default();
    let mut world = plan.world(&ledger);
    world.transcript = keep_transcript.then(Vec::new);
    let before = begin_hand_off(&plan, &mut world, &ledger);
    for fault in faults {
        fault.happen(&plan, &mut world, &ledger, before);
    }
    plan.finish(world, &ledger)
}

impl EventFaultAt {
    fn happen(&self, plan: &Plan, world: &mut World<KvNode>, ledger: &Ledger, before: u64) {
        while world.events < before + self.event {
            assert!(world.step(nanos(HEAL_MS)) == Step::Ran, "it has that many events");
        }
        for action in self.fault.actions(self.sender) {
            plan.act(world, ledger, &action);
        }
    }
}

impl EventFault {
    fn actions(self, sender: NodeIndex) -> Vec<Action> {
        if self == EventFault::Cancel {
            let command = Command::Cancel { request: HAND_OFF };
            return vec![Action::Command { node: RECEIVER, command }];
        }
        self.faults(sender).into_iter().map(Action::Fault).collect()
    }

    fn faults(self, sender: NodeIndex) -> Vec<Fault> {
        let (receiver, sender) = (Nodes(vec![RECEIVER]), Nodes(vec![sender]));
        let crash = |nodes: &Nodes| Fault::Crash { nodes: nodes.clone() };
        let restart = |nodes: &Nodes| Fault::Restart { nodes: nodes.clone(), disk: DiskFate::Kept };
        let stall = |nodes: &Nodes, for_s| Fault::Stall { nodes: nodes.clone(), for_s };
        let block = |from: &Nodes, to: &Nodes| Fault::Block { from: from.clone(), to: to.clone() };
        match self {
            EventFault::KillReceiver => vec![crash(&receiver)],
            EventFault::KillSender => vec![crash(&sender)],
            EventFault::BounceReceiver => vec![crash(&receiver), restart(&receiver)],
            EventFault::BounceSender => vec![crash(&sender), restart(&sender)],
            EventFault::BlinkReceiver => vec![stall(&receiver, 0.05)],
            EventFault::BlinkSender => vec![stall(&sender, 0.05)],
            EventFault::StallReceiver => vec![stall(&receiver, 4.5)],
            EventFault::StallSender => vec![stall(&sender, 4.5)],
            EventFault::MuteReceiver => vec![block(&receiver, &sender)],
            EventFault::MuteSender => vec![block(&sender, &receiver)],
            EventFault::Cut => vec![block(&receiver, &sender), block(&sender, &receiver)],
            EventFault::Cancel => Vec::new(),
        }
    }
}

/// Runs until the hand-off begins; says how many events that took.
fn begin_hand_off(plan: &Plan, world: &mut World<KvNode>, ledger: &Ledger) -> u64 {
    loop {
        if let Step::Fault(number) = world.step(nanos(HEAL_MS)) {
            plan.act(world, ledger, &plan.actions[number as usize].action);
            if number == 1 {
                return world.events;
            }
        }
    }
}

/// A hand-off without faults. Node 1 has the first `cached` of 30 tokens; `prefill` says of nodes 1 and 2
/// whether they are to prefill, or to send what they have.
pub fn undisturbed(seed: u64, cached: usize, prefill: [bool; 2]) -> Outcome {
    one_hand_off(seed, cached, prefill).run(false)
}

/// Node 1 has prefilled the beginning of a prompt for itself; node 0 wants all of it, from node 1 and
/// else from node 2. Long after that everything is healed, and node 0 asks again for another one.
fn one_hand_off(seed: u64, cached: usize, prefill: [bool; 2]) -> Plan {
    let mut random = Random::new(seed ^ 0x7472_616e_7366_6572);
    let trouble = Rc::new(Cell::new(0.0));
    let setup = NodeSetup { model: MODEL, capacity: 24, step_ms: 4.0, sabotage: None, trouble };
    let tenant = TenantId::new("acme").expect("a name");
    let tokens: Vec<TokenId> = (0..30).map(|_| random.next_u64() as u32).collect();
    let prompt = |range: std::ops::Range<usize>| Prompt {
        tenant: tenant.clone(),
        tokens: tokens[range].to_vec(),
    };
    let generate = |request, prompt, sources: &[(NodeIndex, bool)]| Command::Generate {
        request,
        prompt,
        sources: sources.to_vec(),
        wait: Duration::from_millis(2500),
        greedy: true,
    };
    let command =
        |at_ms, node, command| PlannedAction { at_ms, action: Action::Command { node, command } };
    let fault = |at_ms, fault| PlannedAction { at_ms, action: Action::Fault(fault) };
    let proof = RequestId(3);
    let sources = [(SENDER, prefill[0]), (2, prefill[1])];
    let both = [(SENDER, true), (2, true)];
    let restart = Fault::Restart { nodes: Nodes(vec![0, 1, 2]), disk: DiskFate::Kept };
    Plan {
        seed,
        links: Links { latency_ms: 0.5, jitter_ms: 1.0, loss: 0.0, duplicate: 0.1 },
        setups: vec![setup; 3],
        actions: vec![
            command(1.0, SENDER, generate(RequestId(1), prompt(0..cached), &[])),
            command(50.0, RECEIVER, generate(HAND_OFF, prompt(0..30), &sources)),
            fault(HEAL_MS, Fault::Heal),
            fault(HEAL_MS, restart),
            command(HEAL_MS + 4000.0, RECEIVER, generate(proof, prompt(3..25), &both)),
        ],
        proofs: vec![proof],
        end_ms: HEAL_MS + 14_000.0,
    }
}

/// Invents a world with mixed faults.
struct Mixer {
    random: Random,
    seed: u64,
    sabotage: Option<Sabotage>,
    trouble: Rc<Cell<f64>>,
    models: Vec<Model>,
    texts: Vec<Vec<TokenId>>,
    actions: Vec<PlannedAction>,
    /// When much happens at once, so that faults meet hand-offs.
    moments_ms: Vec<f64>,
    requests: u128,
}

impl Mixer {
    fn new(seed: u64, sabotage: Option<Sabotage>) -> Self {
        let mut random = Random::new(seed ^ 0x6b76_2d6d_6978_6564);
        let mut models = vec![MODEL; 2 + random.below(3)];
        if random.below(4) == 0 {
            // One of them speaks of something else.
            let odd = models.last_mut().expect("at least two");
            match random.below(3) {
                0 => odd.weights += 1,
                1 => odd.dtype = KvDtype::Bf16,
                _ => odd.block_tokens *= 2,
            }
        }
        let text = |random: &mut Random| (0..44).map(|_| random.next_u64() as u32).collect();
        let texts = (0..2).map(|_| text(&mut random)).collect();
        let moments = 1 + random.below(4);
        let moments_ms = (0..moments).map(|_| random.unit() * (HEAL_MS - 1000.0)).collect();
        let corrupt = if random.below(3) == 0 { 0.02 } else { 1e-9 };
        Mixer {
            seed,
            sabotage,
            trouble: Rc::new(Cell::new(corrupt)),
            models,
            texts,
            actions: Vec::new(),
            moments_ms,
            requests: 0,
            random,
        }
    }

    fn plan(mut self) -> Plan {
        for _ in 0..8 + self.random.below(16) {
            self.request();
        }
        for _ in 0..self.random.below(12) {
            let at_ms = self.moment();
            let fault = self.fault();
            self.act(at_ms, Action::Fault(fault));
        }
        let nodes = self.models.len();
        let all = Nodes((0..nodes as NodeIndex).collect());
        self.act(HEAL_MS, Action::Fault(Fault::Heal));
        self.act(HEAL_MS, Action::Calm);
        let restart = Fault::Restart { nodes: all, disk: DiskFate::Kept };
        self.act(HEAL_MS, Action::Fault(restart));
        let proofs = self.proofs();
        let capacity = 14 + self.random.below(30) as u32;
        // The last is longer than a receiver waits for a sign of life.
        let step_ms = [2.0, 10.0, 60.0, 600.0][self.random.below(4)];
        let setup = |model| NodeSetup {
            model,
            capacity,
            step_ms,
            sabotage: self.sabotage,
            trouble: self.trouble.clone(),
        };
        let links = Links {
            latency_ms: 0.1 + self.random.unit() * 5.0,
            jitter_ms: self.random.unit() * 8.0,
            loss: 0.0,
            duplicate: self.random.unit() * 0.1,
        };
        let setups = self.models.iter().copied().map(setup).collect();
        let (seed, actions) = (self.seed, self.actions);
        Plan { seed, links, setups, actions, proofs, end_ms: PROOF_MS + 24_000.0 }
    }

    fn act(&mut self, at_ms: f64, action: Action) {
        self.actions.push(PlannedAction { at_ms, action });
    }

    fn node(&mut self) -> NodeIndex {
        self.random.below(self.models.len()) as NodeIndex
    }

    fn moment(&mut self) -> f64 {
        let at = self.random.below(self.moments_ms.len());
        self.moments_ms[at] + self.random.unit() * MOMENT_MS
    }

    fn next_request(&mut self) -> RequestId {
        self.requests += 1;
        RequestId(self.requests)
    }

    /// A prompt that begins as others do, whoever's they are.
    fn prompt(&mut self) -> Prompt {
        let tenant = ["acme", "bolt", "coil"][self.random.below(3)];
        let text = &self.texts[self.random.below(2)];
        let mut tokens = text[..4 + self.random.below(40)].to_vec();
        if self.random.below(3) == 0 {
            let at = self.random.below(tokens.len());
            tokens[at] = self.random.next_u64() as u32;
        }
        Prompt { tenant: TenantId::new(tenant).expect("a name"), tokens }
    }

    fn request(&mut self) {
        let (node, request, prompt) = (self.node(), self.next_request(), self.prompt());
        let at_ms = self.moment();
        let mut sources = Vec::new();
        for _ in 0..1 + self.random.below(3) {
            let peer = self.node();
            if peer != node {
                let source = (peer, self.random.below(3) > 0);
                // Sometimes twice, so that a late stream of the first attempt meets the second.
                sources.extend(std::iter::repeat_n(source, 1 + self.random.below(2)));
            }
        }
        let wait = Duration::from_millis(50 + self.random.below(4000) as u64);
        let greedy = self.random.below(2) == 0;
        let command = Command::Generate { request, prompt, sources, wait, greedy };
        self.act(at_ms, Action::Command { node, command });
        if self.random.below(4) == 0 {
            let command = Command::Cancel { request };
            let later_ms = self.random.unit() * self.random.unit() * MOMENT_MS;
            self.act(at_ms + later_ms, Action::Command { node, command });
        }
    }

    fn fault(&mut self) -> Fault {
        let one = |mixer: &mut Self| Nodes(vec![mixer.node()]);
        match self.random.below(12) {
            0 | 1 => Fault::Crash { nodes: one(self) },
            2 | 3 => Fault::Restart { nodes: one(self), disk: DiskFate::Kept },
            4 | 5 => {
                // Long ones, and ones about as long as a wait.
                let for_s = match self.random.below(2) {
                    0 => self.random.unit() * self.random.unit() * STALL_S_MAX,
                    _ => 0.3 + self.random.unit() * 0.5,
                };
                Fault::Stall { nodes: one(self), for_s }
            }
            6 => Fault::Partition { groups: vec![one(self)] },
            7 | 8 => Fault::Block { from: one(self), to: one(self) },
            9 => Fault::Loss { rate: self.random.unit() * self.random.unit() * 0.4 },
            10 => {
                let ppm = self.random.below(100_000) as i64 - 50_000;
                Fault::Drift { nodes: one(self), ppm }
            }
            _ => Fault::Heal,
        }
    }

    /// When all is well, every node gets a prompt that nobody has seen from a peer of the same model.
    fn proofs(&mut self) -> Vec<RequestId> {
        let mut proofs = Vec::new();
        for node in 0..self.models.len() {
            let like = |peer: &usize| *peer != node && self.models[*peer] == self.models[node];
            let Some(peer) = (0..self.models.len()).find(like) else { continue };
            let tokens = (0..20).map(|_| self.random.next_u64() as u32).collect();
            let prompt = Prompt { tenant: TenantId::new("acme").expect("a name"), tokens };
            let request = self.next_request();
            let command = Command::Generate {
                request,
                prompt,
                sources: vec![(peer as NodeIndex, true)],
                wait: Duration::from_secs(5),
                greedy: true,
            };
            // One after the other: together they would need more room than there may be.
            let at_ms = PROOF_MS + 4000.0 * node as f64;
            self.act(at_ms, Action::Command { node: node as NodeIndex, command });
            proofs.push(request);
        }
        proofs
    }
}

fn nanos(millis: f64) -> u64 {
    (millis * 1e6) as u64
}

const MODEL: Model = Model { weights: 1, dtype: KvDtype::F16, block_tokens: 4 };
const RECEIVER: NodeIndex = 0;
const SENDER: NodeIndex = 1;
/// The request of the one hand-off.
pub const HAND_OFF: RequestId = RequestId(2);
const HEAL_MS: f64 = 6_000.0;
const MOMENT_MS: f64 = 300.0;
const STALL_S_MAX: f64 = 5.0;
/// After the longest stall, the longest patience and the loss of every old connection.
const PROOF_MS: f64 = HEAL_MS + STALL_S_MAX * 1000.0 + 9_000.0;
