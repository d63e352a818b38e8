//! Both sides over calls that get lost, doubled and late, in any order.

use std::collections::BTreeSet;

use protocol::random::Random;

use super::*;

/// Something under way.
enum Packet {
    Told(NodeId, CallId, Vec<u8>),
    Heard(NodeId, CallId, Vec<u8>),
}

struct Pair {
    random: Random,
    now: u64,
    owner: Owner,
    reporters: Vec<(Reporter, BTreeSet<u64>)>,
    packets: Vec<(u64, Packet)>,
    /// Share of packets lost, and of packets doubled.
    trouble: f64,
}

impl Pair {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let owner = Pair::owner(&mut random);
        let reporters = (0..3).map(|_| Pair::reporter(&mut random)).collect();
        let trouble = random.unit() * 0.5;
        Pair { random, now: 0, owner, reporters, packets: Vec::new(), trouble }
    }

    fn owner(random: &mut Random) -> Owner {
        let config = OwnerConfig { dumps_max: 1, ..OwnerConfig::default() };
        let mut owner = Owner::new(config, random.next_u64());
        owner.members(at(0), nodes(0..9));
        owner
    }

    fn reporter(random: &mut Random) -> (Reporter, BTreeSet<u64>) {
        let config = ReporterConfig {
            piece_names: 1 + random.below(9),
            events_max: 4 + random.below(60),
            batch_events: 5,
            ..ReporterConfig::default()
        };
        (Reporter::new(config, random.next_u64()), BTreeSet::new())
    }

    fn send(&mut self, packet: impl Fn() -> Packet) {
        let copies = match self.random.unit() {
            u if u < self.trouble => 0,
            u if u < self.trouble * 1.5 => 2,
            _ => 1,
        };
        for _ in 0..copies {
            let late = self.random.below(if self.trouble > 0.0 { 1500 } else { 20 }) as u64;
            self.packets.push((self.now + late, packet()));
        }
    }

    fn give(&mut self, n: u8, input: ReporterInput) {
        let mut out = Vec::new();
        self.reporters[n as usize].0.handle(at(self.now), input, &mut out);
        for ReporterOutput::Tell { call, report, .. } in out {
            self.send(|| Packet::Told(node(n), call, report.to_bytes()));
        }
    }

    /// A replica starts, with nothing.
    fn serve(&mut self, n: u8) {
        self.reporters[n as usize].1.clear();
        self.give(n, ReporterInput::Serve { identity: MODEL });
        // To it alone: the others' owner is their own business here.
        self.give(n, ReporterInput::Members(vec![node(8)]));
    }

    fn change_something(&mut self) {
        let n = self.random.below(3) as u8;
        let from = self.random.below(60) as u64;
        let changed: Vec<u64> = (from..from + 1 + self.random.below(4) as u64).collect();
        let stores = self.random.below(2) == 0;
        let held = &mut self.reporters[n as usize].1;
        let input = if stores {
            held.extend(&changed);
            let names = names(&changed);
            ReporterInput::Stored { identity: MODEL, first: name(0), names }
        } else {
            held.retain(|n| !changed.contains(n));
            ReporterInput::Removed { identity: MODEL, names: names(&changed) }
        };
        self.give(n, input);
        match self.random.below(2000) {
            0 => {
                self.reporters[n as usize] = Pair::reporter(&mut self.random);
                self.serve(n);
            }
            1 => {
                self.give(n, ReporterInput::Unserve { identity: MODEL });
                self.serve(n);
            }
            2 => self.owner = Pair::owner(&mut self.random),
            3 => {
                // It is taken for dead for a moment.
                self.owner.members(at(self.now), (0..9).filter(|m| *m != n).map(node));
                self.owner.members(at(self.now), nodes(0..9));
            }
            _ => {}
        }
    }

    fn step(&mut self) {
        self.now += 1;
        for n in 0..3 {
            if self.reporters[n].0.next_deadline().is_some_and(|due| due <= at(self.now)) {
                self.give(n as u8, ReporterInput::Timer);
            }
        }
        if self.owner.next_deadline().is_some_and(|due| due <= at(self.now)) {
            self.owner.tick(at(self.now));
        }
        while let Some(due) = self.packets.iter().position(|packet| packet.0 <= self.now) {
            match self.packets.swap_remove(due).1 {
                Packet::Told(from, call, bytes) => {
                    let report = Report::from_bytes(&bytes).expect("a report");
                    let heard = self.owner.told(at(self.now), from, report);
                    self.send(|| Packet::Heard(from, call, heard.to_bytes()));
                }
                Packet::Heard(to, call, bytes) => {
                    let heard = Heard::from_bytes(&bytes).expect("an answer");
                    self.give(to.0[0], ReporterInput::Answered { call, heard });
                }
            }
        }
    }

    #[track_caller]
    fn check(&mut self, seed: u64) {
        for n in 0..3 {
            let held: Vec<u64> = self.reporters[n].1.iter().copied().collect();
            let known = self.owner.names_of(&PART, node(n as u8));
            assert_eq!(known, Some(names(&held)), "seed {seed}: node {n}");
        }
        assert_eq!(self.owner.stats().unequal, 0, "seed {seed}");
    }
}

#[test]
fn whatever_happens_to_messages_the_owner_knows_in_the_end() {
    for seed in 0..60 {
        let mut pair = Pair::new(seed);
        (0..3).for_each(|n| pair.serve(n));
        for _ in 0..15_000 {
            if pair.random.below(4) == 0 {
                pair.change_something();
            }
            pair.step();
        }
        pair.trouble = 0.0;
        // The longest back-off and the longest pause without news.
        (0..30_000).for_each(|_| pair.step());
        pair.check(seed);
    }
}
