//! A node with a replica: the shell around both machines, as thin as the daemon's must be. A call is a
//! datagram there and one back, so that it may be carried out although its answer is lost, twice, or
//! long after its caller has given it up: all that QUIC and a stuttering host can do, more often.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use bincode::{Decode, Encode};
use cache::directory::{
    CallId, Owner, OwnerConfig, Reporter, ReporterConfig, ReporterInput, ReporterOutput,
};
use protocol::directory::{Found, HOLDERS_MAX, Heard, Part, Query, Report, ShortName};
use protocol::random::Random;
use protocol::{Duration, Instant, Machine, NodeId, wire};

use super::pool::{Pool, Texts};
use super::scenario::Counts;
use crate::actor::{Actor, Effect, NodeIndex, Stimulus};
use crate::world::Birth;

/// What a node is made of.
#[derive(Clone, Debug)]
pub struct NodeSetup {
    /// Replicas of one model have the same.
    pub identity: [u8; 32],
    pub texts: Texts,
    /// Blocks of its pool.
    pub capacity: usize,
    pub reporter: ReporterConfig,
    pub owner: OwnerConfig,
    /// Prompts in a second; none while it is 0.
    pub prompts_per_s: Rc<Cell<f64>>,
    /// The shell does one thing wrong, as long as there are prompts.
    pub sabotage: Option<Sabotage>,
    pub ledger: Rc<RefCell<Ledger>>,
}

/// What a shell could do wrong, to see that the oracles notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// Does not tell the reporter of some removed blocks.
    KeepRemoved,
    /// Does not tell the reporter of some stored blocks.
    ForgetStored,
    /// Tells the owner another name than was reported. The machines notice that by themselves.
    ChangeNames,
    /// Does not tell the owner who is no member any more.
    HideDepartures,
    /// Lets no timer of the reporter run.
    DeafToTimers,
}

/// What all nodes write down together.
#[derive(Debug, Default)]
pub struct Ledger {
    pub counts: Counts,
    /// What must not happen, and did.
    pub broken: Vec<String>,
}

#[derive(Clone, Debug)]
pub enum Command {
    /// Who is a member now.
    Members(Vec<NodeIndex>),
    /// Ask who has a prompt.
    Ask,
}

/// A node in the world.
pub struct DirectoryNode {
    me: NodeIndex,
    setup: NodeSetup,
    random: Random,
    now: Instant,
    out: Vec<Effect>,
    pub reporter: Reporter,
    pub owner: Owner,
    pub pool: Pool,
    inputs: VecDeque<ReporterInput>,
    calls: BTreeMap<CallId, Instant>,
    commands: VecDeque<Command>,
    members: BTreeSet<NodeId>,
    /// Who the owner takes for members.
    met: BTreeSet<NodeId>,
    prompt_at: Instant,
    /// Bytes beyond those of datagrams that real calls would have sent.
    pub more_bytes: u64,
}

#[derive(Clone, Debug, Encode, Decode)]
enum Packet {
    Report { call: u64, body: Vec<u8> },
    Heard { call: u64, body: Vec<u8> },
    Query { body: Vec<u8> },
    Found { body: Vec<u8> },
}

/// The id of a node of the world.
pub fn id(node: NodeIndex) -> NodeId {
    let mut id = [0; 32];
    id[..4].copy_from_slice(&node.to_le_bytes());
    NodeId(id)
}

fn index(id: NodeId) -> NodeIndex {
    NodeIndex::from_le_bytes(*id.0.first_chunk().expect("32 bytes"))
}

impl DirectoryNode {
    pub fn new(setup: NodeSetup, birth: Birth) -> Self {
        let mut random = Random::new(birth.seed);
        DirectoryNode {
            me: birth.node,
            now: Instant::ORIGIN,
            out: Vec::new(),
            reporter: Reporter::new(setup.reporter.clone(), random.next_u64()),
            owner: Owner::new(setup.owner.clone(), random.next_u64()),
            pool: Pool::new(setup.capacity),
            inputs: VecDeque::new(),
            calls: BTreeMap::new(),
            commands: VecDeque::new(),
            members: BTreeSet::new(),
            met: BTreeSet::new(),
            prompt_at: Instant::ORIGIN,
            more_bytes: 0,
            random,
            setup,
        }
    }

    /// Leaves a command for the node; the world must then look at its timer.
    pub fn command(&mut self, command: Command) {
        self.commands.push_back(command);
    }

    /// What it holds of a part, in order: what owners must know of it.
    pub fn names(&self, part: &Part) -> Vec<ShortName> {
        let is_of =
            |first| Part::of(self.setup.identity, self.setup.reporter.shards, first) == *part;
        self.pool.names().filter(|(_, first)| is_of(*first)).map(|(name, _)| name).collect()
    }

    pub fn identity(&self) -> [u8; 32] {
        self.setup.identity
    }

    fn sabotaged(&self, sabotage: Sabotage) -> bool {
        self.setup.sabotage == Some(sabotage) && self.setup.prompts_per_s.get() > 0.0
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Members(members) => {
                let members: Vec<NodeId> = members.into_iter().map(id).collect();
                self.members = members.iter().copied().collect();
                match self.setup.sabotage == Some(Sabotage::HideDepartures) {
                    true => self.met.extend(members.iter().copied()),
                    false => self.met = self.members.clone(),
                }
                self.owner.members(self.now, self.met.iter().copied());
                self.inputs.push_back(ReporterInput::Members(members));
            }
            Command::Ask => self.ask(),
        }
    }

    /// Computes a prompt, as if a client had asked.
    fn prompt(&mut self) {
        let prompt = self.setup.texts.draw(&mut self.random);
        let (removed, stored) = self.pool.compute(&prompt);
        let (identity, first) = (self.setup.identity, prompt[0]);
        let skips = |node: &mut Self, what| node.sabotaged(what) && node.random.below(8) == 0;
        if !removed.is_empty() && !skips(self, Sabotage::KeepRemoved) {
            self.inputs.push_back(ReporterInput::Removed { identity, names: removed });
        }
        if !stored.is_empty() && !skips(self, Sabotage::ForgetStored) {
            self.inputs.push_back(ReporterInput::Stored { identity, first, names: stored });
        }
    }

    fn ask(&mut self) {
        let names = self.setup.texts.draw(&mut self.random);
        let (part, owners) = self.reporter.owners_of(self.setup.identity, names[0]);
        let Some(owner) = owners.first() else { return };
        let query = Query { part, names, holders_max: HOLDERS_MAX as u16 };
        match index(*owner) == self.me {
            true => _ = self.answer(&query),
            false => self.send(index(*owner), Packet::Query { body: query.to_bytes() }),
        }
    }

    fn answer(&mut self, query: &Query) -> Found {
        let found = self.owner.query(query);
        let mut ledger = self.setup.ledger.borrow_mut();
        ledger.counts.answers += 1;
        ledger.counts.holders += found.holders.len() as u64;
        let strangers = found.holders.iter().filter(|holder| !self.members.contains(&holder.node));
        let me = self.me;
        ledger.broken.extend(
            strangers.map(|h| format!("node {me} names {}, which has left", index(h.node))),
        );
        found
    }

    fn told(&mut self, from: NodeId, mut report: Report) -> Heard {
        if self.sabotaged(Sabotage::ChangeNames) && self.random.below(20) == 0 {
            change(&mut report);
        }
        self.owner.told(self.now, from, report)
    }

    fn on_packet(&mut self, from: NodeIndex, packet: Packet) {
        match packet {
            Packet::Report { call, body } => {
                let Ok(report) = Report::from_bytes(&body) else { return };
                let heard = self.told(id(from), report);
                self.send(from, Packet::Heard { call, body: heard.to_bytes() });
            }
            Packet::Heard { call, body } => {
                // Who has given the call up does not hear the answer.
                if let (Ok(heard), Some(_)) =
                    (Heard::from_bytes(&body), self.calls.remove(&CallId(call)))
                {
                    self.inputs.push_back(ReporterInput::Answered { call: CallId(call), heard });
                }
            }
            Packet::Query { body } => {
                let Ok(query) = Query::from_bytes(&body) else { return };
                let found = self.answer(&query);
                self.send(from, Packet::Found { body: found.to_bytes() });
            }
            Packet::Found { body } => {
                let found = Found::from_bytes(&body).expect("an owner keeps to its bounds");
                self.setup.ledger.borrow_mut().counts.found += u64::from(!found.holders.is_empty());
            }
        }
    }

    fn send(&mut self, to: NodeIndex, packet: Packet) {
        let bytes = wire::encode(&packet);
        let rpc = match packet {
            Packet::Report { .. } | Packet::Query { .. } => REQUEST_BYTES,
            Packet::Heard { .. } | Packet::Found { .. } => REPLY_BYTES,
        };
        let more_packets = (bytes.len() as u64 + rpc) / PACKET_PAYLOAD_BYTES;
        self.more_bytes += rpc + more_packets * PACKET_HEADERS_BYTES;
        self.out.push(Effect::Send { to, bytes });
    }

    fn on_output(&mut self, output: ReporterOutput) {
        let ReporterOutput::Tell { owner, call, report } = output;
        if index(owner) == self.me {
            let heard = self.told(owner, report);
            self.inputs.push_back(ReporterInput::Answered { call, heard });
        } else {
            self.calls.insert(call, self.now + self.setup.reporter.answer_wait);
            let packet = Packet::Report { call: call.0, body: report.to_bytes() };
            self.send(index(owner), packet);
        }
    }

    /// Runs until nothing is left to do at this moment.
    fn settle(&mut self) {
        loop {
            if let Some(input) = self.inputs.pop_front() {
                let mut outputs = Vec::new();
                self.reporter.handle(self.now, input, &mut outputs);
                outputs.into_iter().for_each(|output| self.on_output(output));
            } else if let Some(command) = self.commands.pop_front() {
                self.on_command(command);
            } else {
                return;
            }
        }
    }

    fn on_timer(&mut self) {
        let now = self.now;
        let late: Vec<CallId> =
            self.calls.iter().filter(|(_, due)| **due <= now).map(|(call, _)| *call).collect();
        for call in late {
            self.calls.remove(&call);
            self.inputs.push_back(ReporterInput::Failed { call });
        }
        if self.owner.next_deadline().is_some_and(|due| due <= now) {
            self.owner.tick(now);
        }
        if self.reporter_deadline().is_some_and(|due| due <= now) {
            self.inputs.push_back(ReporterInput::Timer);
        }
        if self.prompt_at <= now {
            let per_s = self.setup.prompts_per_s.get();
            let wait = if per_s > 0.0 { (0.5 + self.random.unit()) / per_s } else { IDLE_S };
            self.prompt_at = now + Duration::from_secs_f64(wait);
            if per_s > 0.0 {
                self.prompt();
            }
        }
    }

    fn reporter_deadline(&self) -> Option<Instant> {
        let deaf = self.setup.sabotage == Some(Sabotage::DeafToTimers);
        self.reporter.next_deadline().filter(|_| !deaf)
    }
}

/// Another name in the place of the first event's.
fn change(report: &mut Report) {
    if let protocol::directory::News::Blocks { events, .. } = &mut report.news
        && let Some(name) = events.names.first_mut()
    {
        *name = ShortName::from_number(name.number() ^ 1);
    }
}

impl Actor for DirectoryNode {
    fn handle(&mut self, now: Instant, stimulus: Stimulus, effects: &mut Vec<Effect>) {
        self.now = now;
        match stimulus {
            Stimulus::Start { .. } => {
                self.prompt_at = now;
                let identity = self.setup.identity;
                self.inputs.push_back(ReporterInput::Serve { identity });
                self.commands.push_back(Command::Members(vec![self.me]));
            }
            Stimulus::Datagram { from, bytes } => {
                let packet = wire::decode::<Packet, { 1 << 20 }>(&bytes).expect("of this program");
                self.on_packet(from, packet);
            }
            Stimulus::Timer => self.on_timer(),
            Stimulus::Leave => {
                let identity = self.setup.identity;
                self.inputs.push_back(ReporterInput::Unserve { identity });
                self.settle();
                self.out.push(Effect::Gone);
            }
        }
        self.settle();
        effects.append(&mut self.out);
    }

    fn next_deadline(&self) -> Option<Instant> {
        if !self.commands.is_empty() {
            return Some(self.now);
        }
        let dues = [
            self.calls.values().min().copied(),
            self.reporter_deadline(),
            self.owner.next_deadline(),
            Some(self.prompt_at),
        ];
        dues.into_iter().flatten().min()
    }

    fn present(&self) -> Vec<NodeIndex> {
        self.members.iter().map(|member| index(*member)).filter(|node| *node != self.me).collect()
    }

    fn view_hash(&self) -> u64 {
        self.members.len() as u64
    }

    fn broken_bound(&self) -> Option<String> {
        let NodeSetup { owner, reporter, .. } = &self.setup;
        let (stats, links) = (self.owner.stats(), self.reporter.stats().links);
        let bounds = [
            ("names known", stats.names, owner.names_max),
            ("parts", stats.parts, owner.parts_max),
            ("links", links, reporter.owners * usize::from(reporter.shards)),
            ("names reported", self.reporter.stats().names, reporter.names_max),
            // One for each link, and for those to former owners until they are given up.
            ("calls under way", self.calls.len(), CALLS_MAX),
        ];
        let broken = bounds.into_iter().find(|(_, n, max)| n > max);
        broken.map(|(what, n, max)| format!("{n} {what}, at most {max}"))
    }
}

/// How often a node without prompts looks whether there are some.
const IDLE_S: f64 = 0.1;
const CALLS_MAX: usize = 256;
/// The frame of a request (7), method, request id, deadline and lengths, and the header of its stream
/// frame, less what stands in their place here.
const REQUEST_BYTES: u64 = 26;
const REPLY_BYTES: u64 = 10;
/// What a datagram of the data plane has room for, and what it costs: IPv4, UDP, QUIC's short header
/// and tag.
const PACKET_PAYLOAD_BYTES: u64 = 1200;
const PACKET_HEADERS_BYTES: u64 = 28 + 29;
