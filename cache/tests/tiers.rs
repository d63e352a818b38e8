//! What lies below a pool: the machine alone, with a shell that is late, wrong and slow.

use std::collections::{BTreeMap, BTreeSet};

use cache::tiers::{
    DiskFault, DiskSlot, FetchId, HOST_BLOCKS_MIN, HostSlot, Tiers, TiersConfig, TiersInput,
    TiersOutput,
};
use cache::{BlockHash, BlockId};
use protocol::random::Random;
use protocol::{Duration, Instant, Machine};

/// A machine, its clock and what it said last.
struct Bench {
    tiers: Tiers,
    now: Instant,
}

impl Bench {
    fn new(config: TiersConfig) -> Self {
        Bench { tiers: Tiers::new(config), now: Instant::from_millis(1_000) }
    }

    /// With an empty disk.
    fn with_disk(config: TiersConfig) -> Self {
        let mut bench = Bench::new(config);
        assert_eq!(bench.say(TiersInput::DiskFound { blocks: Vec::new() }), []);
        bench
    }

    fn say(&mut self, input: TiersInput) -> Vec<TiersOutput> {
        let mut out = Vec::new();
        self.tiers.handle(self.now, input, &mut out);
        out
    }

    fn step(&mut self) -> Vec<TiersOutput> {
        self.say(TiersInput::Step { landings_max: 100, is_idle: false })
    }

    fn evict(&mut self, n: u8) -> Vec<TiersOutput> {
        self.say(TiersInput::Evicted { block: BlockId(u32::from(n)), name: name(n) })
    }

    fn fetch(&mut self, id: u64, names: &[u8]) -> Vec<TiersOutput> {
        let names = names.iter().map(|n| name(*n)).collect();
        let block_compute_time = Duration::from_millis(10);
        self.say(TiersInput::Fetch { fetch: FetchId(id), names, block_compute_time })
    }

    fn known(&self, n: u8) -> bool {
        self.tiers.known(&[name(n)]) == 1
    }

    /// Answers every write and read of `outputs`, and what these lead to; gives what is left.
    fn serve(&mut self, outputs: Vec<TiersOutput>) -> Vec<TiersOutput> {
        let mut left = Vec::new();
        let mut open = outputs;
        while !open.is_empty() {
            for output in std::mem::take(&mut open) {
                match output {
                    TiersOutput::Write { to, .. } => {
                        open.extend(self.say(TiersInput::Written { to, result: Ok(()) }));
                    }
                    TiersOutput::Read { from, .. } => {
                        let result = Ok(Duration::from_millis(1));
                        open.extend(self.say(TiersInput::Read { from, result }));
                    }
                    other => left.push(other),
                }
            }
            open.extend(self.step());
        }
        left
    }

    /// Fetches, serves, and puts what lands into the pool; says how much that was.
    fn bring(&mut self, id: u64, names: &[u8]) -> usize {
        let mut outputs = self.fetch(id, names);
        outputs.extend(self.step());
        loop {
            let mut next = Vec::new();
            for output in self.serve(std::mem::take(&mut outputs)) {
                match output {
                    TiersOutput::Land { fetch, from, .. } => {
                        let landed = TiersInput::Landed { fetch, from, is_held: true };
                        next.extend(self.say(landed));
                    }
                    TiersOutput::Ended { landed, .. } => return landed,
                    other => panic!("{other:?}"),
                }
            }
            next.extend(self.step());
            outputs = next;
        }
    }
}

fn name(n: u8) -> BlockHash {
    BlockHash([n; 32])
}

fn config(host: u32, ahead: u32, disk: u32) -> TiersConfig {
    TiersConfig { host_blocks: host, host_ahead: ahead, ..TiersConfig::new(host, disk) }
}

#[test]
fn evicted_blocks_go_to_host_then_to_disk_then_are_forgotten() {
    let mut bench = Bench::with_disk(config(4, 2, 3));
    for n in 0..20 {
        let saved = bench.evict(n);
        assert!(matches!(saved[..], [TiersOutput::Save { .. }]), "{n}: {saved:?}");
        let written = bench.step();
        assert_eq!(bench.serve(written), []);
    }
    let stats = bench.tiers.stats();
    assert_eq!((stats.host.blocks, stats.disk.blocks), (4, 3));
    assert_eq!((stats.host.stored, stats.disk.stored), (20, 18));
    assert_eq!((stats.host.dropped, stats.disk.dropped), (0, 15));
    // The host has the last four, the disk what was written of the last five.
    let known: Vec<u8> = (0..20).filter(|n| bench.known(*n)).collect();
    assert_eq!(known, [15, 16, 17, 18, 19]);
    assert_eq!(bench.bring(1, &[15, 16, 17, 18]), 4);
    let stats = bench.tiers.stats();
    assert_eq!((stats.host.hits, stats.disk.hits), (3, 1));
    assert!(!bench.tiers.is_busy());
}

#[test]
fn without_a_disk_the_least_recently_used_is_forgotten() {
    let mut bench = Bench::new(config(3, 1, 0));
    (0..3).for_each(|n| drop(bench.evict(n)));
    // Evicted again: its copy is still there, nothing is copied.
    assert_eq!(bench.evict(0), []);
    bench.evict(3);
    let known: Vec<u8> = (0..5).filter(|n| bench.known(*n)).collect();
    assert_eq!(known, [0, 2, 3]);
    assert_eq!(bench.tiers.stats().host.dropped, 1);
    assert_eq!(bench.bring(1, &[2, 3, 4]), 2);
}

#[test]
fn a_prefix_loses_its_end_first() {
    let mut bench = Bench::new(config(4, 1, 0));
    // As a pool evicts it: the end first.
    for n in (0..4).rev() {
        bench.evict(n);
    }
    bench.evict(9);
    assert_eq!(bench.tiers.known(&[0, 1, 2, 3].map(name)), 3);
    // A fetch makes all of it the most recently used, and the end goes first again.
    assert_eq!(bench.bring(1, &[0, 1, 2]), 3);
    bench.evict(10);
    bench.evict(11);
    assert_eq!(bench.tiers.known(&[0, 1, 2].map(name)), 2);
}

#[test]
fn a_damaged_record_ends_the_fetch_before_it() {
    let mut bench = Bench::new(TiersConfig::new(0, 100));
    let blocks = (0..4).map(|n| (DiskSlot(u32::from(n)), name(n))).collect();
    bench.say(TiersInput::DiskFound { blocks });
    let reads = bench.fetch(1, &[0, 1, 2, 3]);
    assert_eq!(reads.len(), 4);
    let mut landed = Vec::new();
    for n in [3, 0, 2, 1] {
        let result = if n == 2 { Err(DiskFault::Damaged) } else { Ok(Duration::from_millis(1)) };
        bench.say(TiersInput::Read { from: DiskSlot(n), result });
        landed.extend(bench.step());
    }
    let landed: Vec<HostSlot> = landed
        .into_iter()
        .map(|output| match output {
            TiersOutput::Land { from, .. } => from,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(landed.len(), 2);
    let mut out = Vec::new();
    for from in landed {
        out.extend(bench.say(TiersInput::Landed { fetch: FetchId(1), from, is_held: true }));
    }
    assert_eq!(out, [TiersOutput::Ended { fetch: FetchId(1), landed: 2 }]);
    let stats = bench.tiers.stats();
    assert_eq!((stats.disk.corrupt, stats.disk.blocks), (1, 3));
    assert!(!bench.known(2) && bench.known(3));
    assert!(!bench.tiers.is_busy());
}

#[test]
fn a_slow_disk_costs_no_more_than_computing() {
    let mut bench = Bench::new(TiersConfig::new(0, 100));
    let blocks = (0..50).map(|n| (DiskSlot(u32::from(n)), name(n))).collect();
    bench.say(TiersInput::DiskFound { blocks });
    assert_eq!(bench.fetch(1, &[0, 1]).len(), 2);
    // Two blocks take 20 ms to compute.
    assert_eq!(bench.tiers.next_deadline(), Some(bench.now + Duration::from_millis(20)));
    bench.now = bench.now + Duration::from_millis(19);
    assert_eq!(bench.step(), []);
    bench.now = bench.now + Duration::from_millis(1);
    assert_eq!(bench.step(), [TiersOutput::Ended { fetch: FetchId(1), landed: 0 }]);
    assert_eq!(bench.tiers.stats().fetches_late, 1);
    // From now on it is known to be slow, and asked only now and then.
    let asked: usize = (2..34).map(|id| bench.fetch(id, &[id as u8]).len()).sum();
    bench.step();
    assert_eq!(asked, 2);
    // The answers come after all: the blocks are in host memory then, for the next one.
    for n in [0, 1] {
        let result = Ok(Duration::from_millis(20));
        assert_eq!(bench.say(TiersInput::Read { from: DiskSlot(n), result }), []);
    }
    assert_eq!(bench.bring(50, &[0, 1]), 2);
}

#[test]
fn a_disk_that_fails_is_left_alone_for_longer_and_longer() {
    let config = config(4, 4, 10);
    let mut bench = Bench::with_disk(config.clone());
    bench.evict(1);
    let mut waits = Vec::new();
    for _ in 0..8 {
        let written = bench.step();
        let [TiersOutput::Write { to, .. }] = written[..] else { panic!("{written:?}") };
        bench.say(TiersInput::Written { to, result: Err(DiskFault::Failed) });
        assert!(bench.tiers.stats().disk_is_paused);
        let began = bench.now;
        while bench.step().is_empty() {
            bench.now = bench.now + Duration::from_secs(1);
            assert!(bench.now < began + config.disk_pause_max + Duration::from_secs(2));
        }
        waits.push(bench.now.saturating_since(began).as_secs());
        // The write of this step fails at the beginning of the next round.
        let to = DiskSlot(0);
        bench.say(TiersInput::Written { to, result: Err(DiskFault::Failed) });
        bench.now = bench.now + config.disk_pause_max;
    }
    assert!(waits[0] == 5 && waits[1] > waits[0] && waits.ends_with(&[300, 300]), "{waits:?}");
    // The block is still in host memory, and a disk that works again takes it.
    let written = bench.step();
    assert_eq!(bench.serve(written), []);
    let stats = bench.tiers.stats();
    assert_eq!((stats.disk.stored, stats.disk_is_paused), (1, false));
}

#[test]
fn a_full_pool_ends_a_fetch() {
    let mut bench = Bench::new(config(4, 1, 0));
    (0..3).for_each(|n| drop(bench.evict(n)));
    bench.fetch(1, &[0, 1, 2]);
    let landings = bench.say(TiersInput::Step { landings_max: 2, is_idle: false });
    let [TiersOutput::Land { from: a, .. }, TiersOutput::Land { from: b, .. }] = landings[..]
    else {
        panic!("{landings:?}")
    };
    let fetch = FetchId(1);
    assert_eq!(bench.say(TiersInput::Landed { fetch, from: a, is_held: true }), []);
    let end = bench.say(TiersInput::Landed { fetch, from: b, is_held: false });
    assert_eq!(end, [TiersOutput::Ended { fetch, landed: 1 }]);
}

#[test]
fn who_watches_late_is_told_of_what_is_there() {
    let mut bench = Bench::new(config(4, 2, 10));
    bench.evict(1);
    bench.say(TiersInput::DiskFound { blocks: vec![(DiskSlot(0), name(2))] });
    assert_eq!(bench.tiers.take_touched(), []);
    bench.tiers.watch();
    bench.evict(3);
    assert_eq!(bench.tiers.take_touched(), [1, 3, 2].map(name));
    // Only what happens from now on.
    bench.tiers.watch();
    assert_eq!(bench.tiers.take_touched(), []);
}

#[test]
fn idle_time_makes_copies() {
    let mut bench = Bench::with_disk(config(8, 2, 8));
    (0..5).for_each(|n| drop(bench.evict(n)));
    assert_eq!(bench.step(), []);
    let written = bench.say(TiersInput::Step { landings_max: 1, is_idle: true });
    assert_eq!(written.len(), 5);
    bench.serve(written);
    assert_eq!(bench.tiers.stats().disk.blocks, 5);
}

#[test]
fn defaults() {
    assert_eq!(TiersConfig::new(10, 0).host_blocks, 10);
    let buffer = TiersConfig::new(0, 10);
    assert_eq!((buffer.host_blocks, buffer.host_ahead), (HOST_BLOCKS_MIN, HOST_BLOCKS_MIN));
    let both = TiersConfig::new(1000, 10);
    assert_eq!((both.host_blocks, both.host_ahead), (1000, 250));
}

/// A shell that keeps names where bytes would be, and answers late, in any order and badly.
struct Chaos {
    bench: Bench,
    random: Random,
    host: BTreeMap<HostSlot, BlockHash>,
    /// `None` for a record that is damaged.
    disk: BTreeMap<DiskSlot, Option<BlockHash>>,
    writes: BTreeMap<DiskSlot, (HostSlot, BlockHash)>,
    reads: BTreeMap<DiskSlot, (HostSlot, BlockHash)>,
    landings: Vec<(FetchId, HostSlot)>,
    fetches: BTreeSet<FetchId>,
    landed: u64,
    faults: bool,
    /// What is known, as somebody sees it who is told of what was touched.
    told: BTreeSet<BlockHash>,
}

impl Chaos {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let host = 2 + random.below(12) as u32;
        let ahead = 1 + random.below(host as usize) as u32;
        let disk = random.below(30) as u32;
        let config = TiersConfig {
            disk_writes_max: 1 + random.below(4),
            disk_reads_max: 1 + random.below(4),
            fetches_max: 1 + random.below(4),
            ..config(host, ahead, disk)
        };
        let mut bench = Bench::new(config);
        bench.tiers.watch();
        Chaos {
            bench,
            random,
            host: BTreeMap::new(),
            disk: BTreeMap::new(),
            writes: BTreeMap::new(),
            reads: BTreeMap::new(),
            landings: Vec::new(),
            fetches: BTreeSet::new(),
            landed: 0,
            faults: true,
            told: BTreeSet::new(),
        }
    }

    fn say(&mut self, input: TiersInput) {
        for output in self.bench.say(input) {
            self.obey(output);
        }
        let (stats, config) = (self.bench.tiers.stats(), self.bench.tiers.config());
        assert!(stats.host.blocks <= config.host_blocks as usize);
        assert!(stats.disk.blocks <= config.disk_blocks as usize);
        assert!(self.writes.len() <= config.disk_writes_max);
        assert!(self.reads.len() <= config.disk_reads_max);
        assert!(self.fetches.len() <= config.fetches_max + 1);
        let tiers = &mut self.bench.tiers;
        for name in tiers.take_touched() {
            match tiers.known(&[name]) {
                1 => self.told.insert(name),
                _ => self.told.remove(&name),
            };
        }
    }

    /// Who is told of what was touched knows what is known.
    fn check_told(&self) {
        let known = |name: &BlockHash| self.bench.tiers.known(&[*name]) == 1;
        let all = (0..60).chain([200]).map(name);
        assert!(all.filter(known).eq(self.told.iter().copied()), "a change was not told");
    }

    fn obey(&mut self, output: TiersOutput) {
        match output {
            TiersOutput::Save { block, into } => {
                self.assert_host_is_free(into);
                assert!(!self.landings.iter().any(|(_, slot)| *slot == into), "read while landing");
                self.host.insert(into, name(block.0 as u8));
            }
            TiersOutput::Land { fetch, name, from } => {
                assert!(self.fetches.contains(&fetch));
                assert_eq!(self.host.get(&from), Some(&name), "a wrong block lands");
                self.landings.push((fetch, from));
            }
            TiersOutput::Write { name, from, to } => {
                assert_eq!(self.host.get(&from), Some(&name), "a wrong block is written");
                assert!(!self.reads.contains_key(&to), "written while read");
                self.disk.insert(to, None);
                assert!(self.writes.insert(to, (from, name)).is_none(), "written twice");
            }
            TiersOutput::Read { name, from, into } => {
                self.assert_host_is_free(into);
                assert!(!self.writes.contains_key(&from), "read while written");
                self.host.remove(&into);
                assert!(self.reads.insert(from, (into, name)).is_none(), "read twice");
            }
            TiersOutput::Ended { fetch, .. } => assert!(self.fetches.remove(&fetch)),
        }
    }

    fn assert_host_is_free(&self, slot: HostSlot) {
        let used = self.writes.values().chain(self.reads.values()).any(|(used, _)| *used == slot);
        assert!(!used, "{slot:?} is in use");
    }

    fn answer_write(&mut self) {
        let at = self.random.below(self.writes.len());
        let Some((&to, &(_, name))) = self.writes.iter().nth(at) else { return };
        self.writes.remove(&to);
        let fails = self.faults && self.random.below(8) == 0;
        if !fails {
            // Also writes that seem to go well leave damage now and then.
            let damaged = self.faults && self.random.below(10) == 0;
            self.disk.insert(to, (!damaged).then_some(name));
        }
        let result = if fails { Err(DiskFault::Failed) } else { Ok(()) };
        self.say(TiersInput::Written { to, result });
    }

    fn answer_read(&mut self) {
        let at = self.random.below(self.reads.len());
        let Some((&from, &(into, name))) = self.reads.iter().nth(at) else { return };
        self.reads.remove(&from);
        let fails = self.faults && self.random.below(10) == 0;
        let result = match self.disk.get(&from) {
            _ if fails => Err(DiskFault::Failed),
            Some(Some(there)) if *there == name => {
                self.host.insert(into, name);
                Ok(Duration::from_millis(self.random.below(20) as u64))
            }
            _ => Err(DiskFault::Damaged),
        };
        self.say(TiersInput::Read { from, result });
    }

    fn land(&mut self) {
        let is_held = !self.faults || self.random.below(10) > 0;
        for (fetch, from) in std::mem::take(&mut self.landings) {
            self.landed += u64::from(is_held);
            self.say(TiersInput::Landed { fetch, from, is_held });
        }
    }

    fn act(&mut self, id: u64) {
        match self.random.below(12) {
            0..=3 => {
                let n = self.random.below(60) as u8;
                let input = TiersInput::Evicted { block: BlockId(u32::from(n)), name: name(n) };
                self.say(input);
            }
            4 => {
                let first = self.random.below(60) as u8;
                let names = (first..(first + 6).min(60)).map(name).collect();
                let fetch = FetchId(id);
                self.fetches.insert(fetch);
                let block_compute_time = Duration::from_millis(self.random.below(30) as u64);
                self.say(TiersInput::Fetch { fetch, names, block_compute_time });
            }
            5 => {
                if let Some(&fetch) = self.fetches.first() {
                    self.say(TiersInput::Cancel { fetch });
                }
            }
            6 | 7 if !self.writes.is_empty() => self.answer_write(),
            8 | 9 if !self.reads.is_empty() => self.answer_read(),
            _ => {
                let landings_max = self.random.below(4);
                let is_idle = self.random.below(4) == 0;
                self.say(TiersInput::Step { landings_max, is_idle });
                self.land();
            }
        }
        self.bench.now = self.bench.now + Duration::from_millis(self.random.below(40) as u64);
        if id.is_multiple_of(16) {
            self.check_told();
        }
    }

    /// Some blocks of a life before, which may be in host memory again.
    fn find_on_disk(&mut self, places: u32) {
        let mut names: Vec<u8> = (0..60).collect();
        self.random.shuffle(&mut names);
        let found = self.random.below(places as usize + 1);
        let slots = (0..places).map(DiskSlot).zip(names.into_iter().map(name));
        let blocks: Vec<_> = slots.take(found).collect();
        for &(slot, name) in &blocks {
            let damaged = self.random.below(10) == 0;
            self.disk.insert(slot, (!damaged).then_some(name));
        }
        self.say(TiersInput::DiskFound { blocks });
    }

    fn settle(&mut self) {
        self.faults = false;
        for _ in 0..10_000 {
            while !self.writes.is_empty() {
                self.answer_write();
            }
            while !self.reads.is_empty() {
                self.answer_read();
            }
            self.say(TiersInput::Step { landings_max: 10, is_idle: true });
            self.land();
            if !self.bench.tiers.is_busy() {
                return;
            }
        }
        panic!("it does not come to rest");
    }
}

#[test]
fn chaos_never_lands_a_wrong_block_and_heals() {
    let mut landed = 0;
    for seed in 0..3_000 {
        let mut chaos = Chaos::new(seed);
        let disk_blocks = chaos.bench.tiers.config().disk_blocks;
        (0..20).for_each(|id| chaos.act(id));
        if disk_blocks > 0 {
            chaos.find_on_disk(disk_blocks);
        }
        (20..400).for_each(|id| chaos.act(id));
        chaos.settle();
        chaos.check_told();
        assert!(chaos.fetches.is_empty(), "seed {seed}");
        landed += chaos.landed;
        // After the heal a block goes down and comes up again.
        chaos.bench.now = chaos.bench.now + Duration::from_secs(1_000);
        let (fetch, name) = (FetchId(u64::MAX), name(200));
        chaos.say(TiersInput::Evicted { block: BlockId(200), name });
        chaos.settle();
        chaos.fetches.insert(fetch);
        let block_compute_time = Duration::from_secs(1);
        chaos.say(TiersInput::Fetch { fetch, names: vec![name], block_compute_time });
        let before = chaos.landed;
        chaos.settle();
        assert_eq!(chaos.landed, before + 1, "seed {seed}");
    }
    assert!(landed > 5_000, "{landed} blocks landed");
}
