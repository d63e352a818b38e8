//! One node, hand-fed. What happens among many is in the simulator (tests/sim).

use super::wire::{BUCKETS, Body, DATAGRAM_BYTES_MAX, Datagram, INCARNATION_MAX, Update, VERSION};
use super::*;
use crate::NodeId;
use crate::random::Random;

type Node = Membership<NodeId, Addresses>;
type Output = MembershipOutput<NodeId, Addresses>;
type Heard = Update<NodeId, Addresses>;

fn id(n: u8) -> NodeId {
    NodeId([n; 32])
}

fn contact() -> Addresses {
    Addresses::new(["192.0.2.1:4001".parse().expect("an address")]).expect("few")
}

fn alive(n: u8, incarnation: u64) -> Heard {
    Update::Alive { id: id(n), incarnation, version: 0, contact: contact() }
}

/// Node 0 among members `1..members`.
struct Bench {
    node: Node,
    now: Instant,
    out: Vec<Output>,
}

impl Bench {
    fn new(members: u8) -> Self {
        Bench::with(members, MembershipConfig::default())
    }

    fn with(members: u8, config: MembershipConfig) -> Self {
        let mut node = Node::new(config, id(0), contact(), 0, 0, 1).expect("sound");
        let now = Instant::from_millis(1000);
        node.preset(now, (1..members).map(|n| (id(n), contact())));
        let mut out = Vec::new();
        node.handle(now, MembershipInput::Start { seeds: vec![] }, &mut out);
        assert_eq!(out, [MembershipOutput::Persist { incarnation: 0 }]);
        Bench { node, now, out }
    }

    /// A datagram from a member, with that incarnation.
    fn hear(&mut self, from: u8, incarnation: u64, body: Body<NodeId>, updates: Vec<Heard>) {
        let bytes = Datagram { version: VERSION, flags: 0, incarnation, body, updates }.encode();
        self.raw(from, bytes);
    }

    fn news(&mut self, from: u8, updates: Vec<Heard>) {
        self.hear(from, 0, Body::Gossip, updates);
    }

    fn raw(&mut self, from: u8, bytes: Vec<u8>) {
        let input = MembershipInput::Datagram { from: id(from), bytes };
        self.node.handle(self.now, input, &mut self.out);
    }

    /// Lets that much time pass; nobody answers.
    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(at) = self.node.next_deadline().filter(|at| *at <= until) {
            self.now = at.max(self.now);
            self.node.handle(self.now, MembershipInput::Timer, &mut self.out);
        }
        self.now = until;
    }

    /// Lets time pass while all others answer pings, but those in `silent`.
    fn pass_answered(&mut self, time: Duration, silent: &[u8]) {
        let until = self.now + time;
        while self.now < until {
            self.pass(Duration::from_millis(10));
            for (to, datagram) in self.sent() {
                if let (Body::Ping { probe }, false) = (datagram.body, silent.contains(&to)) {
                    let incarnation = self.state(to).1;
                    self.hear(to, incarnation, Body::Ack { probe }, vec![]);
                }
            }
        }
    }

    fn sent(&mut self) -> Vec<(u8, Datagram<NodeId, Addresses>)> {
        let mut sent = Vec::new();
        for output in std::mem::take(&mut self.out) {
            if let MembershipOutput::Send { to: Destination::Node(to), bytes } = output {
                assert!(bytes.len() <= DATAGRAM_BYTES_MAX);
                sent.push((to.0[0], Datagram::decode(&bytes).expect("own datagrams are sound")));
            }
        }
        sent
    }

    fn state(&self, n: u8) -> (MemberState, u64) {
        let member = self.node.member(&id(n)).expect("known");
        (member.state, member.incarnation)
    }

    fn kill(&mut self, n: u8) {
        let dead = Update::Dead { id: id(n), incarnation: 0 };
        let liars = (1..8).filter(|from| *from != n);
        for from in liars.take(2) {
            self.news(from, vec![dead.clone()]);
        }
        assert_eq!(self.state(n), (MemberState::Dead, 0));
        self.out.clear();
    }
}

#[test]
fn an_unanswered_probe_leads_to_suspicion_then_death() {
    let mut bench = Bench::new(2);
    bench.pass(Duration::from_secs(20));
    let events: Vec<_> = bench
        .out
        .iter()
        .filter_map(|o| match o {
            MembershipOutput::Event(event) => Some(event.clone()),
            _ => None,
        })
        .collect();
    assert_eq!(
        events,
        [
            MembershipEvent::Suspected { id: id(1), incarnation: 0 },
            MembershipEvent::Died { id: id(1), incarnation: 0 },
        ]
    );
    assert_eq!(bench.node.present(), 1);
}

#[test]
fn every_second_probe_goes_to_the_neighbour() {
    /// Whom the node pings within that time; all answer.
    fn pinged(bench: &mut Bench, time: Duration) -> Vec<usize> {
        let (until, mut pings) = (bench.now + time, vec![0; 30]);
        while bench.now < until {
            bench.pass(Duration::from_millis(10));
            for (to, datagram) in bench.sent() {
                if let Body::Ping { probe } = datagram.body {
                    pings[usize::from(to)] += 1;
                    let incarnation = bench.state(to).1;
                    bench.hear(to, incarnation, Body::Ack { probe }, vec![]);
                }
            }
        }
        pings
    }
    let distance = |n: &u8| id(*n).digest().wrapping_sub(id(0).digest());
    let mut ring: Vec<u8> = (1..30).collect();
    ring.sort_by_key(distance);
    let [nearest, next] = [ring[0], ring[1]].map(usize::from);
    let mut bench = Bench::new(30);
    // Two rounds of the list, at two probes a second.
    let pings = pinged(&mut bench, Duration::from_secs(58));
    assert!((58..=62).contains(&pings[nearest]), "{pings:?}");
    let others = pings.iter().enumerate().filter(|(n, _)| *n > 0 && *n != nearest);
    assert!(others.map(|(_, count)| *count).all(|count| (1..=3).contains(&count)), "{pings:?}");
    // While it is suspected, the one after it; when it has refuted that, itself again.
    let accusers = vec![id(ring[9])];
    bench.news(ring[9], vec![Update::Suspect { id: id(ring[0]), incarnation: 0, accusers }]);
    assert!(pinged(&mut bench, Duration::from_secs(4))[next] >= 3);
    bench.hear(ring[0], 1, Body::Gossip, vec![]);
    assert!(pinged(&mut bench, Duration::from_secs(4))[nearest] >= 3);
}

#[test]
fn the_suspect_is_told_first() {
    let mut bench = Bench::new(9);
    bench.news(2, vec![Update::Suspect { id: id(5), incarnation: 0, accusers: vec![id(2)] }]);
    assert_eq!(bench.state(5).0, MemberState::Suspect);
    let to_suspect = bench.sent().into_iter().find(|(to, _)| *to == 5).expect("it is checked");
    assert!(matches!(to_suspect.1.body, Body::Ping { .. }));
    let told = Update::Suspect { id: id(5), incarnation: 0, accusers: vec![id(2)] };
    assert_eq!(to_suspect.1.updates, [told]);
    // Its answer, with a higher incarnation, ends it.
    bench.hear(5, 1, Body::Gossip, vec![]);
    assert_eq!(bench.state(5), (MemberState::Alive, 1));
}

#[test]
fn false_claims_about_this_node_are_persisted_then_refuted() {
    let claims = [
        Update::Suspect { id: id(0), incarnation: 0, accusers: vec![id(2)] },
        Update::Dead { id: id(0), incarnation: 4 },
        Update::Left { id: id(0), incarnation: 7 },
        alive(0, 20),
        // Used up in one step: no.
        Update::Dead { id: id(0), incarnation: INCARNATION_MAX },
    ];
    let mut bench = Bench::new(4);
    for (claim, expect) in claims.into_iter().zip([1, 5, 8, 21, 21 + (1 << 20)]) {
        bench.out.clear();
        bench.news(2, vec![claim]);
        assert_eq!(bench.node.incarnation(), expect);
        assert_eq!(bench.out[0], MembershipOutput::Persist { incarnation: expect });
        let (to, answer) = bench.sent().remove(0);
        assert_eq!((to, &answer.updates[0]), (2, &alive(0, expect)));
    }
}

#[test]
fn the_departed_return_by_direct_contact_only() {
    let mut bench = Bench::new(9);
    bench.kill(5);
    bench.news(2, vec![alive(5, 9)]);
    bench.hear(2, 0, Body::Entries, vec![alive(5, 9)]);
    assert_eq!(bench.state(5), (MemberState::Dead, 0));
    assert_eq!(bench.node.stats().ghosts_refused, 2);
    // It is asked itself, and told what is held of it.
    bench.pass(Duration::from_millis(100));
    let asked = bench.sent().into_iter().find(|(to, _)| *to == 5).expect("it is asked");
    assert_eq!(asked.1.updates[0], Update::Dead { id: id(5), incarnation: 0 });
    // Late datagrams of its former life do not count.
    bench.hear(5, 0, Body::Ping { probe: 1 }, vec![alive(5, 0)]);
    assert_eq!(bench.state(5), (MemberState::Dead, 0));
    bench.hear(5, 1, Body::Ping { probe: 1 }, vec![]);
    assert_eq!(bench.state(5), (MemberState::Alive, 1));
    assert_eq!(bench.node.stats().returns, 1);
}

#[test]
fn another_address_in_another_life() {
    let moved = Addresses::new(["192.0.2.9:1".parse().expect("an address")]).expect("few");
    let introduction = |incarnation, version| Update::Alive {
        id: id(5),
        incarnation,
        version,
        contact: moved.clone(),
    };
    // Its incarnation is seen first; its record version starts anew.
    let mut bench = Bench::new(9);
    bench
        .news(2, vec![Update::Alive { id: id(5), incarnation: 0, version: 7, contact: contact() }]);
    bench.sent();
    bench.hear(5, 1, Body::Ping { probe: 1 }, vec![]);
    let asked = bench.sent().into_iter().find(|(to, _)| *to == 5).expect("an answer");
    assert_eq!(asked.1.flags, super::wire::FLAG_UNKNOWN);
    bench.hear(5, 1, Body::Gossip, vec![introduction(1, 0)]);
    assert_eq!(bench.node.contact(&id(5)), Some(&moved));
    assert_eq!(bench.node.member(&id(5)).expect("known").version, 0);
    // From then on, versions count again.
    bench
        .news(2, vec![Update::Alive { id: id(5), incarnation: 1, version: 0, contact: contact() }]);
    assert_eq!(bench.node.contact(&id(5)), Some(&moved));
    // Also for one that was dead.
    bench.kill(6);
    bench.hear(6, 1, Body::Ping { probe: 1 }, vec![]);
    let asked = bench.sent().into_iter().find(|(to, _)| *to == 6).expect("an answer");
    assert_eq!(asked.1.flags, super::wire::FLAG_UNKNOWN);
}

#[test]
fn one_claim_of_death_is_checked_two_are_believed() {
    let dead = Update::Dead { id: id(5), incarnation: 0 };
    let mut bench = Bench::new(9);
    bench.news(2, vec![dead.clone()]);
    bench.news(2, vec![dead.clone()]);
    assert_eq!(bench.state(5).0, MemberState::Suspect, "one says so, twice");
    assert!(bench.sent().iter().any(|(to, d)| *to == 5 && matches!(d.body, Body::Ping { .. })));
    bench.news(3, vec![dead.clone()]);
    assert_eq!(bench.state(5).0, MemberState::Dead);
    // Old beliefs of a peer are not even an accusation.
    bench.hear(2, 0, Body::Entries, vec![Update::Dead { id: id(6), incarnation: 0 }]);
    assert_eq!(bench.state(6).0, MemberState::Alive);
}

#[test]
fn leaving_is_believed_of_oneself() {
    let left = |n| Update::Left { id: id(n), incarnation: 0 };
    let mut bench = Bench::new(9);
    bench.news(5, vec![left(5)]);
    assert_eq!(bench.state(5).0, MemberState::Left);
    bench.news(2, vec![left(6)]);
    assert_eq!(bench.state(6).0, MemberState::Suspect, "another says so: it may contradict");
    bench.pass_answered(Duration::from_secs(2), &[6]);
    assert_eq!(bench.state(6).0, MemberState::Left);
}

#[test]
fn accusers_that_are_often_wrong_are_ignored() {
    let mut bench = Bench::new(30);
    for round in 0..8 {
        let accusers = vec![id(2)];
        bench.news(2, vec![Update::Suspect { id: id(5), incarnation: round, accusers }]);
        bench.hear(5, round + 1, Body::Gossip, vec![]);
    }
    assert_eq!(bench.node.stats().accusations_damped, 4);
    let (state, incarnation) = bench.state(5);
    assert_eq!((state, incarnation), (MemberState::Alive, 8));
}

#[test]
fn relayed_incarnations_far_ahead_are_refused() {
    let mut bench = Bench::new(9);
    bench.news(2, vec![alive(5, 1 << 30), alive(6, 9)]);
    assert_eq!((bench.state(5).1, bench.state(6).1), (0, 9));
    assert_eq!(bench.node.stats().jumps_refused, 1);
    bench.hear(5, 1 << 30, Body::Gossip, vec![]);
    assert_eq!(bench.state(5).1, 1 << 30, "its own word");
}

#[test]
fn the_table_is_bounded_and_the_longest_departed_gives_way() {
    let config = MembershipConfig { members_max: 8, ..Default::default() };
    let mut bench = Bench::with(9, config);
    bench.news(2, vec![alive(20, 0)]);
    assert!(bench.node.member(&id(20)).is_none());
    assert_eq!(bench.node.stats().members_refused, 1);
    bench.kill(5);
    bench.kill(6);
    bench.news(2, vec![alive(20, 0)]);
    assert!(bench.node.member(&id(20)).is_some() && bench.node.member(&id(5)).is_none());
    assert!(bench.node.member(&id(6)).is_some());
}

#[test]
fn a_stall_of_this_node_accuses_nobody() {
    let mut bench = Bench::new(9);
    bench.pass_answered(Duration::from_secs(3), &[]);
    bench.news(2, vec![Update::Suspect { id: id(5), incarnation: 0, accusers: vec![id(2)] }]);
    bench.now = bench.now + Duration::from_secs(60);
    bench.node.handle(bench.now, MembershipInput::Timer, &mut bench.out);
    assert_eq!(bench.state(5).0, MemberState::Suspect);
    assert_eq!((bench.node.stats().stalls, bench.node.stats().deaths), (1, 0));
    // Called in time from then on, it judges again.
    bench.out.clear();
    bench.pass_answered(Duration::from_secs(20), &[5]);
    assert_eq!(bench.state(5).0, MemberState::Dead);
}

#[test]
fn silence_of_the_helpers_speaks_against_oneself() {
    let mut bench = Bench::new(20);
    bench.pass(Duration::from_secs(5));
    assert!(bench.node.stats().health >= 2, "{:?}", bench.node.stats());
    let probes = bench.node.stats().probes;
    bench.pass(Duration::from_secs(5));
    assert!(bench.node.stats().probes - probes < 15, "it probes less often");
}

#[test]
fn noise_neither_panics_nor_changes_anything() {
    let mut bench = Bench::new(9);
    let mut random = Random::new(3);
    let before = bench.node.view_hash();
    let ours = Datagram {
        version: VERSION,
        flags: 0,
        incarnation: 0,
        body: Body::Digest { buckets: vec![0; BUCKETS * 4] },
        updates: vec![alive(5, 0), Update::Left { id: id(6), incarnation: 0 }],
    }
    .encode();
    for round in 0..20_000 {
        let length = random.below(if round % 3 == 0 { 1400 } else { 40 });
        let mut bytes: Vec<u8> = (0..length).map(|_| random.next_u64() as u8).collect();
        if round % 2 == 0 && length > 4 {
            bytes[..4].copy_from_slice(&[VERSION, 0, 0, random.below(10) as u8]);
        }
        if round % 5 == 0 {
            bytes = ours[..random.below(ours.len())].to_vec();
        }
        bench.raw(3, bytes);
        bench.out.clear();
    }
    let stats = bench.node.stats();
    assert!(stats.malformed + stats.other_version > 19_000, "{stats:?}");
    assert_eq!(bench.node.view_hash(), before);
}

/// What a member with a valid certificate may send: anything that decodes.
#[test]
fn lies_of_a_member_stay_within_bounds() {
    let config = MembershipConfig { members_max: 64, news_max: 32, ..Default::default() };
    let mut bench = Bench::with(30, config);
    let mut random = Random::new(5);
    for _ in 0..20_000 {
        let n = |random: &mut Random| random.below(256) as u8;
        let incarnation = match random.below(4) {
            0 => INCARNATION_MAX,
            1 => random.next_u64() >> 2,
            _ => random.below(5) as u64,
        };
        let about = n(&mut random);
        let update = match random.below(4) {
            0 => alive(about, incarnation),
            1 => {
                let accusers = (0..random.below(5)).map(|_| id(n(&mut random))).collect();
                Update::Suspect { id: id(about), incarnation, accusers }
            }
            2 => Update::Dead { id: id(about), incarnation },
            _ => Update::Left { id: id(about), incarnation },
        };
        let body = match random.below(9) {
            0 => Body::Entries,
            1 => Body::Ping { probe: n(&mut random).into() },
            2 => Body::Ack { probe: n(&mut random).into() },
            3 => Body::PingRequest { probe: 1, target: id(n(&mut random)) },
            4 => Body::Nack { probe: n(&mut random).into() },
            5 => Body::Sync { root: random.next_u64(), members: random.below(99) as u32 },
            6 => Body::Digest { buckets: vec![n(&mut random); BUCKETS * 4] },
            7 => Body::Want { buckets: [n(&mut random); BUCKETS / 8] },
            _ => Body::Gossip,
        };
        let from = n(&mut random);
        bench.hear(from, random.below(3) as u64, body, vec![update]);
        bench.pass(Duration::from_millis(random.below(10) as u64));
        bench.out.clear();
        let stats = bench.node.stats();
        assert!(stats.news <= 33 && stats.present + stats.departed <= 65, "{stats:?}");
        assert!(stats.probes_in_flight <= PROBES_MAX && stats.relays_in_flight <= RELAYS_MAX);
        assert!(stats.verifications_waiting <= 65 && stats.suspects <= stats.present);
    }
    let stats = bench.node.stats();
    let counted = [stats.jumps_refused, stats.members_refused, stats.relays_refused, stats.deaths];
    assert!(counted.iter().all(|n| *n > 50), "{stats:?}");
}
