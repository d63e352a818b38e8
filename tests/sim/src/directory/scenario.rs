//! Worlds in which nodes tell each other what they have, from a seed with mixed faults.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use cache::directory::{OwnerConfig, ReporterConfig};
use protocol::directory::{HOLDERS_MAX, Part, Query, owners};
use protocol::random::Random;
use protocol::{Machine as _, NodeId};

use super::node::{Command, DirectoryNode, Ledger, NodeSetup, Sabotage, id};
use super::pool::Texts;
use crate::actor::NodeIndex;
use crate::fault::{DiskFate, Fault, Nodes, apply};
use crate::net::Links;
use crate::world::{Birth, SECOND, Step, World};

/// A world, and all that will happen to it.
#[derive(Debug)]
pub struct Plan {
    seed: u64,
    links: Links,
    setups: Vec<NodeSetup>,
    /// By virtual nanoseconds.
    actions: Vec<(u64, Action)>,
    random: Random,
}

/// Something that happens to the world from outside.
#[derive(Clone, Debug)]
enum Action {
    Fault(Fault),
    /// A node learns who is a member now, which is whom it can reach.
    View(NodeIndex),
    /// A node takes others for dead, for a moment.
    WrongView(NodeIndex),
    Ask(NodeIndex),
    /// No more prompts.
    Calm,
}

/// What a run has left behind.
#[derive(Debug)]
pub struct Outcome {
    /// What must not happen, and did.
    pub broken: Vec<String>,
    pub counts: Counts,
    pub events: u64,
    pub transcript: Option<Vec<u8>>,
}

/// What has happened.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Queries answered by owners, and the holders named.
    pub answers: u64,
    pub holders: u64,
    /// Answers with holders that came back to who asked.
    pub found: u64,
    /// Of the owners that are left at the end: nodes that said all they had, and sets that were not equal.
    pub dumps: u64,
    pub unequal: u64,
    /// Of the reporters that are left at the end.
    pub reports: u64,
    pub reported: u64,
    pub dumped: u64,
    /// Names compared at the end.
    pub compared: u64,
}

impl Counts {
    pub fn add(&mut self, other: &Counts) {
        let Counts { answers, holders, found, dumps, unequal, .. } = other;
        self.answers += answers;
        self.holders += holders;
        self.found += found;
        self.dumps += dumps;
        self.unequal += unequal;
        self.reports += other.reports;
        self.reported += other.reported;
        self.dumped += other.dumped;
        self.compared += other.compared;
    }
}

impl Plan {
    /// Some nodes with one model or two, and random faults for twenty seconds; then all is healed, and
    /// [`SETTLED_WITHIN_S`] later owners must know what every node has.
    pub fn mixed(seed: u64, sabotage: Option<Sabotage>) -> Self {
        let mut random = Random::new(seed ^ 0x6469_7265_6374_6f72);
        let nodes = 2 + random.below(9);
        let texts =
            Texts { families: 3, variants: 1 + random.below(12), shared: 5, blocks_max: 20 };
        let reporter = ReporterConfig {
            shards: [1, 1, 3][random.below(3)],
            piece_names: 4 + random.below(60),
            events_max: 16 + random.below(500),
            batch_events: 8 + random.below(100),
            ..ReporterConfig::default()
        };
        let owner = OwnerConfig { dumps_max: 1 + random.below(3), ..OwnerConfig::default() };
        let models = 1 + random.below(4) / 3;
        let prompts_per_s = Rc::new(Cell::new(1.0 + random.unit() * 30.0));
        let ledger = Rc::new(RefCell::new(Ledger::default()));
        let setup = |node: usize| NodeSetup {
            identity: [(node % models) as u8; 32],
            texts,
            capacity: 40 + 60 * (node % 4),
            reporter: reporter.clone(),
            owner: owner.clone(),
            prompts_per_s: prompts_per_s.clone(),
            sabotage,
            ledger: ledger.clone(),
        };
        let setups = (0..nodes).map(setup).collect();
        let links = Links {
            latency_ms: 0.1 + random.unit() * 5.0,
            jitter_ms: random.unit() * 8.0,
            loss: 0.0,
            duplicate: random.unit() * 0.1,
        };
        let mut plan = Plan { seed, links, setups, actions: Vec::new(), random };
        plan.invent();
        plan
    }

    fn invent(&mut self) {
        let nodes = self.setups.len();
        let all = || Nodes((0..nodes as NodeIndex).collect());
        for _ in 0..self.random.below(16) {
            let (at, fault) = (self.moment(), self.fault());
            self.actions.push((at, Action::Fault(fault)));
        }
        for _ in 0..self.random.below(6) {
            let (at, node) = (self.moment(), self.node());
            self.actions.push((at, Action::WrongView(node)));
        }
        for _ in 0..40 {
            let at = self.random.below(CALM_S as usize * SECOND as usize) as u64;
            let node = self.node();
            self.actions.push((at, Action::Ask(node)));
        }
        self.actions.push((HEAL_S * SECOND, Action::Fault(Fault::Heal)));
        // Some stay away for good.
        let mut back = all();
        back.0.retain(|_| self.random.below(6) > 0);
        let restart = Fault::Restart { nodes: back, disk: DiskFate::Kept };
        self.actions.push((HEAL_S * SECOND, Action::Fault(restart)));
        self.actions.push((CALM_S * SECOND, Action::Calm));
    }

    fn moment(&mut self) -> u64 {
        self.random.below((HEAL_S * SECOND) as usize) as u64
    }

    fn node(&mut self) -> NodeIndex {
        self.random.below(self.setups.len()) as NodeIndex
    }

    fn fault(&mut self) -> Fault {
        let one = |plan: &mut Self| Nodes(vec![plan.node()]);
        match self.random.below(14) {
            0 | 1 => Fault::Crash { nodes: one(self) },
            2..5 => Fault::Restart { nodes: one(self), disk: DiskFate::Kept },
            5 => Fault::Stall { nodes: one(self), for_s: self.random.unit() * STALL_S_MAX },
            6 | 7 => {
                let half = (0..self.setups.len() as NodeIndex).filter(|n| n % 2 == 0).collect();
                let group = if self.random.below(2) == 0 { Nodes(half) } else { one(self) };
                Fault::Partition { groups: vec![group] }
            }
            8 => Fault::Block { from: one(self), to: one(self) },
            9 => Fault::Loss { rate: self.random.unit() * self.random.unit() * 0.4 },
            10 => {
                Fault::Drift { nodes: one(self), ppm: self.random.below(200_000) as i64 - 100_000 }
            }
            11 | 12 => Fault::Leave { nodes: one(self) },
            _ => Fault::Heal,
        }
    }

    /// Runs it to its end.
    pub fn run(self, keep_transcript: bool) -> Outcome {
        let Plan { seed, links, setups, actions, random } = self;
        let (makers, nodes) = (setups.clone(), setups.len());
        let make =
            move |birth: Birth| DirectoryNode::new(makers[birth.node as usize].clone(), birth);
        let mut world = World::new(seed, nodes, links, make);
        world.transcript = keep_transcript.then(Vec::new);
        let mut run = Run { world, setups, actions: Vec::new(), random };
        for node in 0..nodes as NodeIndex {
            // One comes later.
            if node != 1 {
                run.world.start(node, Vec::new());
            }
        }
        actions.into_iter().for_each(|(at, action)| run.plan(at, action));
        run.plan_views();
        run.finish()
    }
}

struct Run {
    world: World<DirectoryNode>,
    setups: Vec<NodeSetup>,
    actions: Vec<Action>,
    random: Random,
}

impl Run {
    fn plan(&mut self, at: u64, action: Action) {
        self.world.plan_fault(at, self.actions.len() as u32);
        self.actions.push(action);
    }

    /// Everybody learns of what has happened, sooner or later.
    fn plan_views(&mut self) {
        for node in 0..self.setups.len() as NodeIndex {
            let late = SECOND / 5 + self.random.below((VIEW_S_MAX * SECOND) as usize) as u64;
            self.plan(self.world.now + late, Action::View(node));
        }
    }

    fn finish(mut self) -> Outcome {
        let end = (CALM_S + STALL_S_MAX as u64 + SETTLED_WITHIN_S) * SECOND;
        let ledger = self.setups[0].ledger.clone();
        while ledger.borrow().broken.is_empty() {
            match self.world.step(end) {
                Step::Ran => {}
                Step::Fault(number) => self.act(number),
                Step::Idle => break,
            }
        }
        if ledger.borrow().broken.is_empty() {
            let broken = self.judge();
            ledger.borrow_mut().broken = broken;
        }
        let Run { world, .. } = self;
        let Ledger { counts, broken } = ledger.take();
        Outcome { broken, counts, events: world.events, transcript: world.transcript }
    }

    fn act(&mut self, number: u32) {
        self.world.seen.clear();
        match self.actions[number as usize].clone() {
            Action::Fault(fault) => {
                apply(&mut self.world, &fault, &[]);
                self.plan_views();
            }
            Action::View(node) => {
                let members = self.reachable(node);
                self.command(node, Command::Members(members));
            }
            Action::WrongView(node) => {
                let mut members = self.reachable(node);
                members.retain(|member| *member == node || self.random.below(3) > 0);
                self.command(node, Command::Members(members));
                let later = SECOND / 5 + self.random.below(3 * SECOND as usize) as u64;
                self.plan(self.world.now + later, Action::View(node));
            }
            Action::Ask(node) => self.command(node, Command::Ask),
            Action::Calm => self.setups.iter().for_each(|setup| setup.prompts_per_s.set(0.0)),
        }
        if let Err(why) = crate::oracle::bounds_hold(&self.world) {
            self.setups[0].ledger.borrow_mut().broken.push(why.to_string());
        }
    }

    fn command(&mut self, node: NodeIndex, command: Command) {
        if let Some(actor) = &mut self.world.nodes[node as usize].actor {
            actor.command(command);
            self.world.schedule_wake(node);
        }
    }

    fn reachable(&self, node: NodeIndex) -> Vec<NodeIndex> {
        let net = &self.world.net;
        let both = |other: &NodeIndex| net.is_open(node, *other) && net.is_open(*other, node);
        self.world.up().filter(both).collect()
    }

    /// Whether all who own a part know what every node has, and nothing of others.
    fn judge(&mut self) -> Vec<String> {
        let mut broken = Vec::new();
        let up: Vec<NodeIndex> = self.world.up().collect();
        let members: Vec<NodeId> = up.iter().copied().map(id).collect();
        let identities: BTreeSet<[u8; 32]> =
            up.iter().map(|node| self.actor(*node).identity()).collect();
        let mut counts = Counts::default();
        for node in &up {
            let actor = self.actor(*node);
            let (owner, reporter) = (actor.owner.stats(), actor.reporter.stats());
            counts.dumps += owner.dumps;
            counts.unequal += owner.unequal;
            counts.reports += reporter.reports;
            counts.reported += reporter.events;
            counts.dumped += reporter.dumped;
            if reporter.links != reporter.links_well {
                broken.push(format!("node {node}: {reporter:?}"));
            }
            let noticed = owner.unequal > 0;
            if noticed && self.setups[0].sabotage != Some(Sabotage::ChangeNames) {
                broken.push(format!("node {node} was told of another set than it knows"));
            }
            if actor.reporter.next_deadline().is_none() {
                broken.push(format!("node {node} will never say anything again"));
            }
        }
        for identity in identities {
            for shard in 0..self.setups[0].reporter.shards {
                let part = Part { identity, shard, shards: self.setups[0].reporter.shards };
                for owner in owners(&part, &members, self.setups[0].reporter.owners) {
                    let owner = up[members.iter().position(|m| *m == owner).expect("a member")];
                    counts.compared += self.compare(&part, owner, &up, &mut broken);
                }
            }
            self.ask_all(identity, &up, &members, &mut broken);
        }
        self.setups[0].ledger.borrow_mut().counts.add(&counts);
        broken
    }

    fn actor(&self, node: NodeIndex) -> &DirectoryNode {
        self.world.nodes[node as usize].actor.as_ref().expect("it is up")
    }

    fn compare(
        &self,
        part: &Part,
        owner: NodeIndex,
        up: &[NodeIndex],
        broken: &mut Vec<String>,
    ) -> u64 {
        let mut names = 0;
        for node in up {
            let actor = self.actor(*node);
            let serves = actor.identity() == part.identity;
            let has = serves.then(|| actor.names(part));
            let known = self.actor(owner).owner.names_of(part, id(*node));
            names += has.as_ref().map_or(0, |has| has.len() as u64);
            if known != has {
                let (known, has) = (known.map(|k| k.len()), has.map(|h| h.len()));
                broken.push(format!(
                    "owner {owner} knows {known:?} names of node {node}, which has {has:?}"
                ));
            }
        }
        names
    }

    /// Prompts, as an owner answers them and as it is.
    fn ask_all(
        &mut self,
        identity: [u8; 32],
        up: &[NodeIndex],
        members: &[NodeId],
        broken: &mut Vec<String>,
    ) {
        let NodeSetup { texts, reporter, .. } = self.setups[0].clone();
        for _ in 0..20 {
            let names = texts.draw(&mut self.random);
            let part = Part::of(identity, reporter.shards, names[0]);
            let serving =
                up.iter().filter(|node| self.actor(**node).identity() == identity).copied();
            let serving: Vec<NodeIndex> = serving.collect();
            let beginning =
                |node: &NodeIndex| (id(*node), self.actor(*node).pool.beginning(&names) as u32);
            let mut right: Vec<(NodeId, u32)> =
                serving.iter().map(beginning).filter(|(_, blocks)| *blocks > 0).collect();
            right.sort_unstable();
            let query = Query { part, names, holders_max: HOLDERS_MAX as u16 };
            for owner in owners(&part, members, reporter.owners) {
                let owner = up[members.iter().position(|m| *m == owner).expect("a member")];
                let actor = self.world.nodes[owner as usize].actor.as_mut().expect("it is up");
                let found = actor.owner.query(&query);
                let mut holders: Vec<(NodeId, u32)> =
                    found.holders.iter().map(|h| (h.node, h.blocks)).collect();
                holders.sort_unstable();
                if holders != right || found.nodes as usize != serving.len() {
                    let what = (holders.len(), right.len(), found.nodes, serving.len());
                    broken.push(format!("owner {owner} gives a wrong answer: {what:?}"));
                }
            }
        }
    }
}

const HEAL_S: u64 = 20;
/// Everybody has learnt of the heal by then.
const CALM_S: u64 = HEAL_S + VIEW_S_MAX + 1;
const VIEW_S_MAX: u64 = 4;
const STALL_S_MAX: f64 = 5.0;
/// Time from the last fault to the moment at which owners know everything: the longest back-off and the
/// longest pause without news, each with its spread and clocks that are a tenth off, and the time to say
/// all.
pub const SETTLED_WITHIN_S: u64 = 35;
