//! Membership: SWIM (Das, Gupta, Motivala 2002) with Lifeguard (Dadgar, Phillips, Currey 2018).
//!
//! Owns: who is in the mesh and who is held for alive; probing, suspicion, refutation, spread of news,
//! comparison of views, join and leave. Refuses: identity proofs (the transport has made them before a
//! datagram arrives here), addresses (it carries them unread), routing, the content of node records.
//!
//! What it adds to the papers, with reasons in docs/membership.md: probes of several attempts, alarms
//! that make others check a suspect at once, deaths that are checked before they are believed, return
//! of a departed member by direct contact only, anti-entropy of constant cost, and a node that knows
//! when it was stalled itself.

mod config;
mod damping;
mod message;
mod news;
mod probe;
mod receive;
mod send;
mod suspicion;
mod sync;
mod table;
#[cfg(test)]
mod tests;
mod update;
pub mod wire;

use std::collections::BTreeMap;

pub use config::{MembershipConfig, MembershipConfigError};
pub use message::{
    ADDRESSES_MAX, Addresses, Contact, Destination, Identity, MemberState, MemberView,
    MembershipEvent, MembershipInput, MembershipOutput, MembershipStats,
};

use self::damping::Damping;
use self::news::{News, TOPIC_SELF};
use self::probe::{Probe, Relay};
use self::suspicion::Suspicions;
use self::sync::Budget;
use self::table::{Slot, Table};
use crate::random::Random;
use crate::{Duration, Instant, Machine};

/// The membership of one node.
///
/// The shell's loop: hand over [`MembershipInput::Start`], then datagrams as they come and
/// [`MembershipInput::Timer`] when [`next_deadline`](Machine::next_deadline) has come; do what the
/// outputs say, in their order. Hand over the packets and timers of a stall as late as they are: the
/// machine sees by the time how late it is called.
///
/// ```
/// use protocol::membership::*;
/// use protocol::{Instant, Machine, NodeId};
///
/// type Node = Membership<NodeId, Addresses>;
/// let contact = |s: &str| Addresses::new([s.parse().unwrap()]).unwrap();
/// let (a, b) = (NodeId([1; 32]), NodeId([2; 32]));
/// let config = MembershipConfig::default();
/// let mut one = Node::new(config.clone(), a, contact("10.0.0.1:4000"), 1, 0, 7)?;
/// let mut two = Node::new(config, b, contact("10.0.0.2:4000"), 1, 0, 8)?;
/// let mut now = Instant::ORIGIN;
/// let seeds = vec![contact("10.0.0.1:4000")];
/// one.handle(now, MembershipInput::Start { seeds: vec![] }, &mut Vec::new());
/// two.handle(now, MembershipInput::Start { seeds }, &mut Vec::new());
/// while one.present() < 2 || two.present() < 2 {
///     now = one.next_deadline().min(two.next_deadline()).unwrap();
///     let mut out = Vec::new();
///     for (from, node) in [(a, &mut one), (b, &mut two)] {
///         if node.next_deadline() <= Some(now) {
///             let mut sent = Vec::new();
///             node.handle(now, MembershipInput::Timer, &mut sent);
///             out.extend(sent.into_iter().map(|output| (from, output)));
///         }
///     }
///     // The shell: here, a wire between the two.
///     while let Some((from, output)) = out.pop() {
///         let MembershipOutput::Send { bytes, .. } = output else { continue };
///         let (to, node) = if from == a { (b, &mut two) } else { (a, &mut one) };
///         let mut sent = Vec::new();
///         node.handle(now, MembershipInput::Datagram { from, bytes }, &mut sent);
///         out.extend(sent.into_iter().map(|output| (to, output)));
///     }
/// }
/// assert_eq!(one.member(&b).unwrap().state, MemberState::Alive);
/// # Ok::<(), MembershipConfigError>(())
/// ```
#[derive(Debug)]
pub struct Membership<I, C> {
    config: MembershipConfig,
    random: Random,
    id: I,
    contact: C,
    version: u32,
    incarnation: u64,
    phase: Phase,
    seeds: Vec<C>,
    table: Table<I, C>,
    news: News,
    suspicions: Suspicions<I>,
    damping: Damping<I>,
    /// At most [`PROBES_MAX`].
    probes: Vec<Probe>,
    /// At most [`RELAYS_MAX`].
    relays: Vec<Relay<I>>,
    next_probe: u32,
    /// Members to ping because of what others say of them, at most [`VERIFICATIONS_MAX`]; with the
    /// incarnation at which they are said to have departed, to be told to them.
    verifications: BTreeMap<Slot, Option<u64>>,
    /// Lifeguard's local health multiplier: 0 is well, [`HEALTH_MAX`] is worst.
    health: u8,
    /// Largest recent round trip to anyone.
    rtt_peak: Duration,
    sync_budget: Budget,
    /// The view at the last comparison that found a difference, and the wait that followed.
    hunger: (u64, Duration),
    timers: Timers,
    stats: MembershipStats,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    New,
    Running,
    /// Farewells still to send.
    Leaving(u8),
    Gone,
}

/// When each recurring duty is next due.
#[derive(Clone, Copy, Debug)]
struct Timers {
    probe: Instant,
    /// The last round probed the neighbour.
    neighbour: bool,
    sync: Instant,
    seed: Instant,
    seed_backoff: Duration,
    reconnect: Instant,
    /// None while nothing waits to be verified.
    verify: Option<Instant>,
    /// None while no fresh news wait.
    gossip: Option<Instant>,
    gossip_last: Instant,
    /// When the shell was asked to call at the latest.
    expected: Instant,
}

impl<I: Identity, C: Contact> Membership<I, C> {
    /// A node that knows nobody yet. `incarnation` is one more than the last one that this identity
    /// persisted, 0 if it has none; `version` is that of its node record; `seed` makes its choices.
    pub fn new(
        config: MembershipConfig,
        id: I,
        contact: C,
        incarnation: u64,
        version: u32,
        seed: u64,
    ) -> Result<Self, MembershipConfigError> {
        config.validate()?;
        let mut random = Random::new(seed);
        let mut table = Table::new(config.members_max, random.next_u64());
        table.toggle(&id, incarnation, version);
        Ok(Membership {
            news: News::new(config.news_max),
            sync_budget: Budget::new(config.sync_datagrams_per_s_max),
            rtt_peak: config.rtt_initial,
            hunger: (0, config.sync_hungry_interval),
            config,
            random,
            id,
            contact,
            version,
            incarnation,
            phase: Phase::New,
            seeds: Vec::new(),
            table,
            suspicions: Suspicions::new(),
            damping: Damping::new(),
            probes: Vec::new(),
            relays: Vec::new(),
            next_probe: 0,
            verifications: BTreeMap::new(),
            health: 0,
            timers: Timers::at(Instant::ORIGIN),
            stats: MembershipStats::default(),
        })
    }

    /// A running node that already holds these for alive, as if it had been among them for long. For
    /// simulations of large meshes, whose joining would take longer than what is to be seen.
    pub fn preset(&mut self, now: Instant, members: impl IntoIterator<Item = (I, C)>) {
        let members = members.into_iter();
        self.table.reserve_exact(members.size_hint().0.min(self.config.members_max));
        for (id, contact) in members {
            if id != self.id && !self.table.is_full() && self.table.find(&id).is_none() {
                self.table.insert(newcomer(now, id, contact, 0, 0), &mut self.random);
            }
        }
    }

    pub fn id(&self) -> I {
        self.id
    }

    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Members held for present (alive or suspect), this node included.
    pub fn present(&self) -> usize {
        self.table.present() + 1
    }

    /// A number that two nodes share when they hold the same members for present, at the same
    /// incarnations and record versions.
    pub fn view_hash(&self) -> u64 {
        self.table.root()
    }

    /// What is known of a member; not of this node itself.
    pub fn member(&self, id: &I) -> Option<MemberView<'_, I, C>> {
        let slot = self.table.find(id)?;
        Some(view_of(self.table.get(slot)))
    }

    /// Where a member can be reached.
    pub fn contact(&self, id: &I) -> Option<&C> {
        Some(&self.table.get(self.table.find(id)?).contact)
    }

    /// All known members but this node, in no particular order.
    pub fn members(&self) -> impl Iterator<Item = MemberView<'_, I, C>> {
        self.table.iter().map(|(_, member)| view_of(member))
    }

    /// A random present member: for other protocols that need a peer.
    pub fn any(&mut self) -> Option<I> {
        let slot = self.table.any(&mut self.random)?;
        Some(self.table.get(slot).id)
    }

    pub fn stats(&self) -> MembershipStats {
        MembershipStats {
            present: self.present(),
            suspects: self.suspicions.len(),
            departed: self.table.departed().len(),
            health: self.health,
            news: self.news.len(),
            probes_in_flight: self.probes.len(),
            relays_in_flight: self.relays.len(),
            verifications_waiting: self.verifications.len(),
            ..self.stats
        }
    }

    fn start(&mut self, now: Instant, seeds: Vec<C>, out: &mut Out<I, C>) {
        if self.phase != Phase::New {
            return;
        }
        self.phase = Phase::Running;
        self.seeds = seeds;
        self.timers = Timers::at(now);
        // Nodes that start together must not act in step.
        let share = self.random.unit();
        self.timers.probe = now + self.config.probe_interval.mul_f64(share);
        self.timers.sync = now + self.config.sync_interval.mul_f64(share);
        self.timers.reconnect = now + self.config.reconnect_interval.mul_f64(share);
        out.push(MembershipOutput::Persist { incarnation: self.incarnation });
    }

    fn announce(&mut self, now: Instant, contact: C, version: u32) {
        if version <= self.version {
            return;
        }
        self.table.toggle(&self.id, self.incarnation, self.version);
        (self.contact, self.version) = (contact, version);
        self.table.toggle(&self.id, self.incarnation, self.version);
        self.tell(now, TOPIC_SELF);
    }

    fn leave(&mut self, now: Instant) {
        if self.phase == Phase::Running {
            self.phase = Phase::Leaving(FAREWELLS);
            self.timers.gossip = Some(now);
        }
    }

    /// Does everything whose time has come.
    fn run_timers(&mut self, now: Instant, out: &mut Out<I, C>) {
        if let Phase::Leaving(left) = self.phase {
            if self.timers.gossip.is_none_or(|at| at > now) {
                return;
            }
            self.send_farewell(out);
            self.timers.gossip = Some(now + self.config.gossip_gap);
            self.phase = Phase::Leaving(left - 1);
            if left == 1 {
                self.phase = Phase::Gone;
                out.push(MembershipOutput::Gone);
            }
            return;
        }
        self.run_probes(now, out);
        self.run_relays(now, out);
        while let Some(slot) = self.suspicions.overdue(now) {
            let leaving = self.suspicions.get(slot).is_some_and(|s| s.leaving);
            let state = if leaving { MemberState::Left } else { MemberState::Dead };
            let incarnation = self.table.get(slot).incarnation;
            self.depart(now, slot, state, incarnation, out);
        }
        if self.timers.probe <= now {
            self.timers.probe = self.after(self.timers.probe, self.probe_period(), now);
            if let Some(slot) = self.next_target() {
                self.start_probe(now, slot, out);
            }
        }
        if self.timers.sync <= now {
            self.run_sync(now, out);
        }
        if self.timers.seed <= now {
            self.run_seeds(now, out);
        }
        if self.timers.reconnect <= now {
            let next = self.after(self.timers.reconnect, self.config.reconnect_interval, now);
            self.timers.reconnect = next;
            self.reconnect(out);
        }
        if self.timers.verify.is_some_and(|at| at <= now) {
            self.run_verifications(now, out);
        }
        if self.timers.gossip.is_some_and(|at| at <= now) {
            self.run_gossip(now, out);
        }
    }

    /// Whom to probe now: by turns the neighbour on the ring of digests and the next of a shuffled
    /// list. Everyone is some neighbour's, at even times, so that most crashes are noticed within two
    /// intervals; by chance alone it takes more than twice as many probes for that. The list is for the
    /// crashes whose neighbour sleeps, fails or lies.
    fn next_target(&mut self) -> Option<Slot> {
        self.timers.neighbour = !self.timers.neighbour;
        let neighbour = match self.timers.neighbour {
            true => self.table.follower(self.id.digest()),
            false => None,
        };
        neighbour.or_else(|| self.table.next_in_turn(&mut self.random))
    }

    /// The next time of a recurring duty; what was missed is not made up for.
    fn after(&self, due: Instant, period: Duration, now: Instant) -> Instant {
        (due + period).max(now + period / 8)
    }

    /// Lifeguard, section IV-A: a node that doubts itself probes less often.
    fn probe_period(&self) -> Duration {
        self.config.probe_interval * u32::from(self.health + 1)
    }

    /// Called when this node was not run although it should have been: what it failed to hear in that
    /// time says nothing about others.
    fn wake_from_stall(&mut self, now: Instant, late: Duration, out: &mut Out<I, C>) {
        self.stats.stalls += 1;
        out.push(MembershipOutput::Event(MembershipEvent::Stalled { late }));
        self.suspicions.postpone(late);
        self.probes.clear();
        self.relays.clear();
        self.set_health(self.health + 1);
        self.timers.sync = now;
        if late > self.config.departed_retention {
            // Others may have forgotten who departed meanwhile; this view would bring ghosts.
            self.forget_everyone(now);
        }
    }

    fn forget_everyone(&mut self, now: Instant) {
        self.seeds.extend(self.table.iter().take(SEEDS_KEPT).map(|(_, m)| m.contact.clone()));
        self.table = Table::new(self.config.members_max, self.random.next_u64());
        self.table.toggle(&self.id, self.incarnation, self.version);
        self.news = News::new(self.config.news_max);
        self.suspicions.clear();
        self.verifications.clear();
        self.timers.seed = now;
    }

    fn set_health(&mut self, health: u8) {
        self.health = health.min(HEALTH_MAX);
    }
}

impl<I: Identity, C: Contact> Machine for Membership<I, C> {
    type Input = MembershipInput<I, C>;
    type Output = MembershipOutput<I, C>;

    fn handle(&mut self, now: Instant, input: Self::Input, out: &mut Vec<Self::Output>) {
        if let MembershipInput::Start { seeds } = input {
            self.start(now, seeds, out);
        } else if matches!(self.phase, Phase::Running | Phase::Leaving(_)) {
            let late = now.saturating_since(self.timers.expected);
            if late > self.config.stall_threshold {
                self.wake_from_stall(now, late, out);
            }
            match input {
                MembershipInput::Start { .. } => {}
                MembershipInput::Datagram { from, bytes } => self.receive(now, from, &bytes, out),
                MembershipInput::Timer => self.run_timers(now, out),
                MembershipInput::Announce { contact, version } => {
                    self.announce(now, contact, version);
                }
                MembershipInput::Path { node, relayed } => {
                    if let Some(slot) = self.table.find(&node) {
                        self.table.get_mut(slot).relayed = relayed;
                    }
                }
                MembershipInput::Check { node } => {
                    let slot = self.table.find(&node);
                    if let Some(slot) = slot.filter(|s| self.table.get(*s).state.is_present()) {
                        self.start_probe(now, slot, out);
                    }
                }
                MembershipInput::Leave => self.leave(now),
            }
        }
        // A stall is judged once: due timers that this input did not run are late from now on.
        self.timers.expected = self.next_deadline().map_or(now, |at| at.max(now));
    }

    fn next_deadline(&self) -> Option<Instant> {
        let Timers { probe, sync, seed, reconnect, verify, gossip, .. } = self.timers;
        match self.phase {
            Phase::New | Phase::Gone => None,
            Phase::Leaving(_) => gossip,
            Phase::Running => {
                let fixed = probe.min(sync).min(seed).min(reconnect);
                let probes = self.probes.iter().map(|p| p.deadline).min();
                let relays = self.relays.iter().map(|r| r.deadline).min();
                let rest = [verify, gossip, probes, relays, self.suspicions.next_deadline()];
                rest.into_iter().flatten().min().map_or(Some(fixed), |at| Some(at.min(fixed)))
            }
        }
    }
}

impl Timers {
    fn at(now: Instant) -> Self {
        Timers {
            probe: now,
            neighbour: false,
            sync: now,
            seed: now,
            seed_backoff: SEED_BACKOFF_MIN,
            reconnect: now,
            verify: None,
            gossip: None,
            gossip_last: now,
            expected: now,
        }
    }
}

fn newcomer<I, C>(
    now: Instant,
    id: I,
    contact: C,
    incarnation: u64,
    version: u32,
) -> table::Member<I, C> {
    let (since, state) = (now, MemberState::Alive);
    let (rtt, relayed, introduced) = (0, false, true);
    table::Member { id, contact, incarnation, since, version, rtt, state, relayed, introduced }
}

fn view_of<I: Copy, C>(member: &table::Member<I, C>) -> MemberView<'_, I, C> {
    let table::Member { id, state, incarnation, version, since, rtt, .. } = *member;
    let rtt = (rtt > 0).then(|| probe::RTT_UNIT * u32::from(rtt));
    MemberView { id, state, incarnation, contact: &member.contact, version, since, rtt }
}

type Out<I, C> = Vec<MembershipOutput<I, C>>;

const HEALTH_MAX: u8 = 8;
const PROBES_MAX: usize = 32;
const RELAYS_MAX: usize = 64;
const VERIFICATIONS_MAX: usize = 8192;
/// How often a leaving node says so, each time to other members.
const FAREWELLS: u8 = 3;
/// Members whose addresses are tried after a stall that made the view worthless.
const SEEDS_KEPT: usize = 16;
const SEED_BACKOFF_MIN: Duration = Duration::from_millis(250);
