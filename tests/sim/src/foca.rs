//! foca 2, the baseline, as an actor: the same world, network and clocks.
//!
//! Its identity is an IPv4 address with a generation (10 bytes on the wire), as its documentation
//! advises, not our 32-byte key: that is in its favour where bytes are counted. Identities renew
//! themselves when they were declared down.

use std::collections::BTreeMap;
use std::num::{NonZeroU8, NonZeroUsize};

use foca::{Config, Foca, Identity, Member, NoCustomBroadcast, Notification, PeriodicParams};
use foca::{PostcardCodec, Runtime, Timer};
use protocol::random::mix;
use protocol::{Duration, Instant};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde::{Deserialize, Serialize};

use crate::actor::{Actor, Effect, NodeIndex, Sight, Stimulus};
use crate::world::Birth;

/// An address and how often it was renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FocaId {
    ip: [u8; 4],
    port: [u8; 2],
    generation: [u8; 4],
}

impl FocaId {
    fn new(node: NodeIndex, generation: u32) -> Self {
        FocaId { ip: node.to_le_bytes(), port: [15, 161], generation: generation.to_le_bytes() }
    }

    fn node(&self) -> NodeIndex {
        u32::from_le_bytes(self.ip)
    }

    fn generation(&self) -> u32 {
        u32::from_le_bytes(self.generation)
    }
}

impl Identity for FocaId {
    type Addr = [u8; 4];

    fn renew(&self) -> Option<Self> {
        Some(FocaId::new(self.node(), self.generation() + 1))
    }

    fn addr(&self) -> [u8; 4] {
        self.ip
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        self.generation() > adversary.generation()
    }
}

/// foca as tight as it goes at the same probe interval as ours: the suspicion time of our least one
/// with its confirmations, news at once every 100 ms to three, and every repair it offers.
pub fn tightened(members: usize) -> Config {
    let some = |n| NonZeroUsize::new(n).expect("not zero");
    let every =
        |ms, n| PeriodicParams { frequency: Duration::from_millis(ms), num_members: some(n) };
    let digits = ((members + 1) as f64).log10();
    Config {
        probe_period: Duration::from_millis(400),
        probe_rtt: Duration::from_millis(120),
        num_indirect_probes: some(3),
        max_transmissions: NonZeroU8::new((4.0 * digits).ceil() as u8).expect("not zero"),
        suspect_to_down_after: Duration::from_millis((400.0 * digits.max(1.0)) as u64),
        remove_down_after: Some(Duration::from_secs(24 * 3600)),
        max_packet_size: some(1200),
        notify_down_members: true,
        periodic_announce: Some(every(30_000, 1)),
        periodic_announce_to_down_members: Some(every(2_000, 1)),
        periodic_gossip: Some(every(100, 3)),
    }
}

/// A node that runs foca.
pub struct Baseline {
    foca: Foca<FocaId, PostcardCodec, SmallRng, NoCustomBroadcast>,
    period_nanos: u64,
    shell: Shell,
}

/// What foca asks for: timers in order of time and of their making.
#[derive(Default)]
struct Shell {
    now: Instant,
    made: u64,
    timers: BTreeMap<(Instant, u64), Timer<FocaId>>,
    effects: Vec<Effect>,
}

impl Baseline {
    pub fn new(config: Config, birth: Birth) -> Self {
        let id = FocaId::new(birth.node, birth.life);
        let random = SmallRng::seed_from_u64(birth.seed);
        let period_nanos = config.probe_period.as_nanos() as u64;
        let foca = Foca::new(id, config, random, PostcardCodec);
        Baseline { foca, period_nanos, shell: Shell::default() }
    }

    /// What [`World::new`](crate::world::World::new) needs to make such nodes.
    pub fn maker(config: Config) -> impl FnMut(Birth) -> Baseline + 'static {
        move |birth| Baseline::new(config.clone(), birth)
    }

    /// Lets it hold these nodes for present, as if it had been among them for long.
    pub fn knows(&mut self, now: Instant, nodes: &[NodeIndex]) {
        let me = self.foca.identity().node();
        // Nodes that start together must not act in step.
        let spread = mix(u64::from(me)) % self.period_nanos;
        self.shell.now = now + Duration::from_nanos(spread);
        let others = nodes.iter().filter(|n| **n != me).map(|n| Member::alive(FocaId::new(*n, 0)));
        let done = self.foca.apply_many(others, false, &mut self.shell);
        done.expect("alive members can be applied");
        self.shell.effects.clear();
    }
}

impl Runtime<FocaId> for &mut Shell {
    fn notify(&mut self, notification: Notification<'_, FocaId>) {
        let (sight, id) = match notification {
            Notification::MemberUp(id) => (Sight::Joined, id),
            Notification::MemberDown(id) => (Sight::Died, id),
            _ => return,
        };
        self.effects.push(Effect::See { sight, subject: id.node() });
    }

    fn send_to(&mut self, to: FocaId, data: &[u8]) {
        self.effects.push(Effect::Send { to: to.node(), bytes: data.to_vec() });
    }

    fn submit_after(&mut self, event: Timer<FocaId>, after: Duration) {
        self.timers.insert((self.now + after, self.made), event);
        self.made += 1;
    }
}

impl Actor for Baseline {
    /// Errors of foca (a packet for an older identity, say) are what it refuses; its state stands.
    fn handle(&mut self, now: Instant, stimulus: Stimulus, effects: &mut Vec<Effect>) {
        self.shell.now = now;
        match stimulus {
            Stimulus::Start { seeds } => {
                for seed in seeds {
                    if seed != self.foca.identity().node() {
                        let _ = self.foca.announce(FocaId::new(seed, 0), &mut self.shell);
                    }
                }
            }
            Stimulus::Datagram { bytes, .. } => {
                let _ = self.foca.handle_data(&bytes, &mut self.shell);
            }
            Stimulus::Timer => {
                while let Some(entry) = self.shell.timers.first_entry() {
                    if entry.key().0 > now {
                        break;
                    }
                    let _ = self.foca.handle_timer(entry.remove(), &mut self.shell);
                }
            }
            Stimulus::Leave => {
                let _ = self.foca.leave_cluster(&mut self.shell);
            }
        }
        effects.append(&mut self.shell.effects);
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.shell.timers.first_key_value().map(|((at, _), _)| *at)
    }

    fn present(&self) -> Vec<NodeIndex> {
        let mut present: Vec<_> = self.foca.iter_members().map(|m| m.id().node()).collect();
        present.sort_unstable();
        present.dedup();
        present
    }

    fn view_hash(&self) -> u64 {
        let me = self.foca.identity();
        let all = self.foca.iter_members().map(|m| *m.id()).chain([*me]);
        all.fold(0, |hash, id| hash ^ mix(u64::from(id.node()) << 32 | u64::from(id.generation())))
    }

    fn broken_bound(&self) -> Option<String> {
        None
    }
}
