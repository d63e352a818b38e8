//! The world: nodes, the network between them, and time.

use std::collections::VecDeque;

use protocol::Instant;
use protocol::random::Random;

use crate::actor::{Actor, Effect, NodeIndex, Sight, Stimulus};
use crate::clock::Clock;
use crate::disk::{Disk, SimDisk};
use crate::net::{Links, Network};
use crate::queue::{Event, Queue};
use crate::quic::QuicCosts;

/// What an actor is made of at each of its starts.
#[derive(Clone, Copy, Debug)]
pub struct Birth {
    pub node: NodeIndex,
    /// The last incarnation that its disk has kept.
    pub persisted: Option<u64>,
    pub seed: u64,
    /// Starts before this one.
    pub life: u32,
}

/// A host. It has an actor while it is up.
pub struct Node<A> {
    pub actor: Option<A>,
    pub clock: Clock,
    pub disk: SimDisk,
    /// Datagrams that arrived during a stall; at most [`BACKLOG_MAX`], as in a socket's buffer.
    backlog: VecDeque<(NodeIndex, Vec<u8>)>,
    /// When its pending [`Event::Wake`] is due.
    wake: Option<u64>,
    pub stalled_until: Option<u64>,
    pub resumed_at: u64,
    pub down_since: Option<u64>,
    pub up_since: u64,
    lives: u32,
    pub bytes_out: u64,
    pub datagrams_out: u64,
}

/// Something that one node believes of another, with what is true at that moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    pub at: u64,
    pub observer: NodeIndex,
    pub subject: NodeIndex,
    pub sight: Sight,
    /// The subject is not running, since then.
    pub down_since: Option<u64>,
    /// The subject stalls or has stalled a moment ago.
    pub stalls: bool,
    /// When the observer last ended a stall.
    pub observer_resumed_at: u64,
    /// The two could reach each other.
    pub reachable: bool,
}

/// What [`World::step`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Ran,
    /// The fault of that number is due.
    Fault(u32),
    /// Nothing is left until then.
    Idle,
}

pub struct World<A> {
    pub nodes: Vec<Node<A>>,
    pub net: Network,
    pub now: u64,
    pub random: Random,
    queue: Queue,
    packets: Vec<Option<(NodeIndex, NodeIndex, Vec<u8>)>>,
    packets_free: Vec<u32>,
    make: Box<dyn FnMut(Birth) -> A>,
    effects: Vec<Effect>,
    /// What was seen since it was last taken.
    pub seen: Vec<Seen>,
    /// Everything that happened, byte by byte, if it is kept.
    pub transcript: Option<Vec<u8>>,
    /// What QUIC would add to the datagrams, if that is counted.
    pub quic: Option<QuicCosts>,
    pub events: u64,
    pub packets_in_flight: usize,
}

impl<A: Actor> World<A> {
    /// `nodes` hosts that are down. `make` makes an actor at each start.
    pub fn new(
        seed: u64,
        nodes: usize,
        links: Links,
        make: impl FnMut(Birth) -> A + 'static,
    ) -> Self {
        let mut random = Random::new(seed);
        let node = |_| Node {
            actor: None,
            // Clocks do not agree on what time it is.
            clock: Clock::new(0, random.below(1 << 40) as u64),
            disk: SimDisk::default(),
            backlog: VecDeque::new(),
            wake: None,
            stalled_until: None,
            resumed_at: 0,
            down_since: Some(0),
            up_since: 0,
            lives: 0,
            bytes_out: 0,
            datagrams_out: 0,
        };
        World {
            nodes: (0..nodes).map(node).collect(),
            net: Network::new(links),
            now: 0,
            random,
            queue: Queue::default(),
            packets: Vec::new(),
            packets_free: Vec::new(),
            make: Box::new(make),
            effects: Vec::new(),
            seen: Vec::new(),
            transcript: None,
            quic: None,
            events: 0,
            packets_in_flight: 0,
        }
    }

    pub fn own_time(&self, node: NodeIndex) -> Instant {
        self.nodes[node as usize].clock.at(self.now)
    }

    /// Starts a host that is down. `prepare` may change the actor before its first input.
    pub fn start_with(
        &mut self,
        node: NodeIndex,
        seeds: Vec<NodeIndex>,
        prepare: impl FnOnce(&mut A, Instant),
    ) {
        let host = &mut self.nodes[node as usize];
        if host.actor.is_some() {
            return;
        }
        let birth = Birth {
            node,
            persisted: host.disk.read(),
            seed: self.random.next_u64(),
            life: host.lives,
        };
        let mut actor = (self.make)(birth);
        prepare(&mut actor, host.clock.at(self.now));
        host.lives += 1;
        (host.actor, host.down_since, host.up_since) = (Some(actor), None, self.now);
        (host.stalled_until, host.wake) = (None, None);
        self.see(node, node, Sight::Started);
        self.give(node, Stimulus::Start { seeds });
    }

    pub fn start(&mut self, node: NodeIndex, seeds: Vec<NodeIndex>) {
        self.start_with(node, seeds, |_, _| {});
    }

    /// Kills a host: everything that is not on its disk is gone.
    pub fn crash(&mut self, node: NodeIndex) {
        let now = self.now;
        let host = &mut self.nodes[node as usize];
        if host.actor.take().is_some() {
            host.down_since = Some(now);
        }
        host.backlog.clear();
        host.disk.crash();
        (host.wake, host.stalled_until) = (None, None);
    }

    /// Stops a host for that long: it runs nothing, then everything that has piled up at once.
    pub fn stall(&mut self, node: NodeIndex, nanos: u64) {
        let until = self.now + nanos;
        let host = &mut self.nodes[node as usize];
        if host.actor.is_some() && host.stalled_until.is_none_or(|at| at < until) {
            host.stalled_until = Some(until);
            self.queue.push(until, Event::Resume(node));
        }
    }

    pub fn set_drift(&mut self, node: NodeIndex, drift_ppm: i64) {
        let now = self.now;
        let host = &mut self.nodes[node as usize];
        host.clock.set_drift(now, drift_ppm);
        host.wake = None;
        self.schedule_wake(node);
    }

    pub fn leave(&mut self, node: NodeIndex) {
        if self.nodes[node as usize].actor.is_some() {
            self.give(node, Stimulus::Leave);
        }
    }

    pub fn plan_fault(&mut self, at: u64, number: u32) {
        self.queue.push(at, Event::Fault(number));
    }

    /// Puts a datagram of any content on the wire, as if `from` had sent it.
    pub fn inject(&mut self, from: NodeIndex, to: NodeIndex, bytes: Vec<u8>) {
        for delay in self.net.send(self.now, from, to, &mut self.random).into_iter().flatten() {
            self.put_on_wire(delay, from, to, bytes.clone());
        }
    }

    /// Runs until then. Returns early with the number of a fault that is due.
    pub fn run_until(&mut self, until: u64) -> Option<u32> {
        loop {
            match self.step(until) {
                Step::Ran => {}
                Step::Fault(number) => return Some(number),
                Step::Idle => return None,
            }
        }
    }

    /// Lets one thing happen, if there is one until then.
    pub fn step(&mut self, until: u64) -> Step {
        let Some((at, event)) = self.queue.pop(until) else {
            self.now = self.now.max(until);
            return Step::Idle;
        };
        self.now = at;
        self.events += 1;
        match event {
            Event::Deliver(packet) => self.deliver(packet),
            Event::Wake(node) => self.wake(node),
            Event::Resume(node) => self.resume(node),
            Event::Fault(number) => return Step::Fault(number),
        }
        Step::Ran
    }

    pub fn up(&self) -> impl Iterator<Item = NodeIndex> {
        (0..).zip(&self.nodes).filter(|(_, node)| node.actor.is_some()).map(|(index, _)| index)
    }

    fn deliver(&mut self, packet: u32) {
        let (from, to, bytes) = self.packets[packet as usize].take().expect("scheduled once");
        self.packets_free.push(packet);
        self.packets_in_flight -= 1;
        if let Some(quic) = &mut self.quic {
            quic.received(self.now, from, to);
        }
        let host = &mut self.nodes[to as usize];
        if host.actor.is_none() {
            return;
        }
        if host.stalled_until.is_some() {
            if host.backlog.len() < BACKLOG_MAX {
                host.backlog.push_back((from, bytes));
            }
            return;
        }
        self.give(to, Stimulus::Datagram { from, bytes });
    }

    fn wake(&mut self, node: NodeIndex) {
        let host = &mut self.nodes[node as usize];
        if host.wake != Some(self.now) || host.stalled_until.is_some() {
            return;
        }
        host.wake = None;
        let now = host.clock.at(self.now);
        let due = host.actor.as_ref().and_then(|a| a.next_deadline()).is_some_and(|at| at <= now);
        match due {
            true => self.give(node, Stimulus::Timer),
            false => self.schedule_wake(node),
        }
    }

    fn resume(&mut self, node: NodeIndex) {
        let now = self.now;
        let host = &mut self.nodes[node as usize];
        if host.stalled_until != Some(now) {
            return;
        }
        // Timers that came during the stall are gone; the machine says anew what is due.
        (host.stalled_until, host.resumed_at, host.wake) = (None, now, None);
        let backlog = std::mem::take(&mut host.backlog);
        let timers_first = self.random.below(2) == 0;
        if timers_first {
            self.give(node, Stimulus::Timer);
        }
        for (from, bytes) in backlog {
            self.give(node, Stimulus::Datagram { from, bytes });
        }
        if !timers_first {
            self.give(node, Stimulus::Timer);
        }
    }

    /// Hands one input to an actor and does what it says.
    fn give(&mut self, node: NodeIndex, stimulus: Stimulus) {
        self.record(node, &stimulus);
        let host = &mut self.nodes[node as usize];
        let Some(actor) = &mut host.actor else { return };
        let mut effects = std::mem::take(&mut self.effects);
        actor.handle(host.clock.at(self.now), stimulus, &mut effects);
        for effect in effects.drain(..) {
            match effect {
                Effect::Send { to, bytes } => self.send(node, to, bytes),
                Effect::Persist { incarnation } => {
                    let disk = &mut self.nodes[node as usize].disk;
                    disk.write(incarnation);
                    disk.sync();
                }
                Effect::See { sight, subject } => self.see(node, subject, sight),
                Effect::Gone => self.crash(node),
            }
        }
        self.effects = effects;
        self.schedule_wake(node);
    }

    fn send(&mut self, from: NodeIndex, to: NodeIndex, bytes: Vec<u8>) {
        let host = &mut self.nodes[from as usize];
        host.datagrams_out += 1;
        host.bytes_out += bytes.len() as u64 + HEADERS_BYTES;
        if let Some(quic) = &mut self.quic {
            quic.sent(self.now, from, to, bytes.len());
        }
        let [first, second] = self.net.send(self.now, from, to, &mut self.random);
        if let Some(delay) = second {
            self.put_on_wire(delay, from, to, bytes.clone());
        }
        if let Some(delay) = first {
            self.put_on_wire(delay, from, to, bytes);
        }
    }

    fn put_on_wire(&mut self, delay: u64, from: NodeIndex, to: NodeIndex, bytes: Vec<u8>) {
        let packet = Some((from, to, bytes));
        let slot = match self.packets_free.pop() {
            Some(slot) => {
                self.packets[slot as usize] = packet;
                slot
            }
            None => {
                self.packets.push(packet);
                (self.packets.len() - 1) as u32
            }
        };
        self.packets_in_flight += 1;
        self.queue.push(self.now + delay, Event::Deliver(slot));
    }

    fn see(&mut self, observer: NodeIndex, subject: NodeIndex, sight: Sight) {
        let (there, here) = (&self.nodes[subject as usize], &self.nodes[observer as usize]);
        let stalls = there.stalled_until.is_some()
            || there.resumed_at > 0 && self.now - there.resumed_at < MOMENT_NANOS;
        let seen = Seen {
            at: self.now,
            observer,
            subject,
            sight,
            down_since: there.down_since,
            stalls,
            observer_resumed_at: here.resumed_at,
            reachable: self.net.is_open(observer, subject) && self.net.is_open(subject, observer),
        };
        self.note(&[2, sight as u8], observer, subject, &[]);
        self.seen.push(seen);
    }

    /// Looks anew at when a node's timer is due: its actor was changed from outside.
    pub fn schedule_wake(&mut self, node: NodeIndex) {
        let host = &mut self.nodes[node as usize];
        let Some(due) = host.actor.as_ref().and_then(|a| a.next_deadline()) else { return };
        let at = host.clock.world_at(due).max(self.now);
        if host.wake.is_none_or(|wake| at < wake) {
            host.wake = Some(at);
            self.queue.push(at, Event::Wake(node));
        }
    }

    fn record(&mut self, node: NodeIndex, stimulus: &Stimulus) {
        match stimulus {
            Stimulus::Datagram { from, bytes } => self.note(&[1], node, *from, bytes),
            Stimulus::Timer => self.note(&[0], node, 0, &[]),
            Stimulus::Start { .. } => self.note(&[3], node, 0, &[]),
            Stimulus::Leave => self.note(&[4], node, 0, &[]),
        }
    }

    fn note(&mut self, tag: &[u8], node: NodeIndex, other: NodeIndex, bytes: &[u8]) {
        let Some(transcript) = &mut self.transcript else { return };
        transcript.extend_from_slice(tag);
        transcript.extend_from_slice(&self.now.to_le_bytes());
        transcript.extend_from_slice(&node.to_le_bytes());
        transcript.extend_from_slice(&other.to_le_bytes());
        transcript.extend_from_slice(bytes);
    }
}

pub const SECOND: u64 = 1_000_000_000;
/// IPv4 and UDP headers of a datagram.
pub const HEADERS_BYTES: u64 = 28;
/// Datagrams that wait in a stalled host's socket.
const BACKLOG_MAX: usize = 4096;
/// For so long after a stall its echoes are still around.
const MOMENT_NANOS: u64 = 2 * SECOND;
