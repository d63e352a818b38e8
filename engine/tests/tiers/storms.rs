//! Thousands of lives of a disk tier, each with its own troubles: whatever comes up is what went down,
//! and when the trouble is over, blocks come up again.

use super::faulty::{Faults, FaultyFile, SlowDisk};
use cache::tiers::{DiskSlot, FetchId, TiersConfig};
use cache::{BlockHash, BlockId};
use engine::tiers::{FREE_BYTES_KEPT, KvTiers, RecordFormat, Store};
use protocol::random::Random;
use protocol::{Duration, Instant};

const BLOCK_BYTES: usize = 1_100;
const NAMES: usize = 40;
/// What a block takes to compute: sometimes less than to read, or more than any disk here takes.
const SHORT: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(100);

#[derive(Debug, Default)]
struct Seen {
    landed: u64,
    from_disk: u64,
    corrupt: u64,
    failed: u64,
    after_restart: u64,
}

struct Life {
    tiers: KvTiers,
    file: FaultyFile,
    format: RecordFormat,
    disk_blocks: u32,
    random: Random,
    now: Instant,
    fetches: u64,
    seen: Seen,
}

impl Life {
    fn new(seed: u64) -> Self {
        let format = RecordFormat::new(&[1; 32], 16, BLOCK_BYTES);
        let file = FaultyFile::new(seed ^ 0xf11e);
        let mut random = Random::new(seed);
        let disk_blocks = places(&mut random);
        let tiers = begin(&file, format, disk_blocks, &mut random);
        let now = Instant::from_millis(1);
        Life { tiers, file, format, disk_blocks, random, now, fetches: 0, seen: Seen::default() }
    }

    /// The process dies and begins again; the machine may have died with it.
    fn restart(&mut self) {
        self.count();
        if self.random.below(2) == 0 {
            self.file.crash();
        }
        // The bounds may have been changed between two lives.
        self.disk_blocks = places(&mut self.random);
        self.tiers = begin(&self.file, self.format, self.disk_blocks, &mut self.random);
    }

    fn count(&mut self) {
        let stats = self.tiers.stats();
        self.seen.from_disk += stats.disk.hits;
        self.seen.corrupt += stats.disk.corrupt;
        self.seen.failed += u64::from(stats.disk_is_paused);
    }

    fn evict(&mut self, n: usize) {
        let payload = payload(&name(n));
        self.tiers.evicted(self.now, BlockId(n as u32), name(n), &payload);
    }

    fn fetch(&mut self, names: Vec<BlockHash>, block_compute_time: Duration) {
        let fetch = FetchId(self.fetches);
        self.fetches += 1;
        self.tiers.fetch(self.now, fetch, names, block_compute_time);
    }

    fn step(&mut self, is_idle: bool) {
        self.tiers.step(self.now, 4 * BLOCK_BYTES, is_idle);
        while let Some(landing) = self.tiers.next_landing() {
            assert_eq!(*landing.payload, payload(&landing.name), "a wrong block");
            self.seen.landed += 1;
            self.tiers.landed(self.now, landing, true);
        }
        self.now = self.now + Duration::from_millis(self.random.below(10) as u64);
    }

    fn act(&mut self) {
        match self.random.below(10) {
            0..=3 => {
                let n = self.random.below(NAMES);
                self.evict(n);
            }
            4 => {
                let first = self.random.below(NAMES);
                self.fetch((first..(first + 5).min(NAMES)).map(name).collect(), SHORT);
            }
            _ => {
                let is_idle = self.random.below(3) == 0;
                self.step(is_idle);
            }
        }
    }

    fn rest(&mut self) {
        for _ in 0..2_000 {
            self.step(true);
        }
        assert!(!self.tiers.is_busy(), "it comes to rest");
    }
}

fn places(random: &mut Random) -> u32 {
    5 + random.below(20) as u32
}

fn begin(
    file: &FaultyFile,
    format: RecordFormat,
    disk_blocks: u32,
    random: &mut Random,
) -> KvTiers {
    let mut config = TiersConfig::new(0, disk_blocks);
    (config.host_blocks, config.host_ahead) = (6, 6);
    let store = Store::new(file.clone(), format, disk_blocks);
    let pace = 5 + random.below(95);
    let disk = SlowDisk::new(store, random.next_u64(), pace);
    KvTiers::new(config, BLOCK_BYTES, Some(Box::new(disk)))
}

fn name(n: usize) -> BlockHash {
    BlockHash(*blake3::hash(&n.to_le_bytes()).as_bytes())
}

/// What belongs to a name, and to no other.
fn payload(name: &BlockHash) -> Vec<u8> {
    let mut payload = vec![0; BLOCK_BYTES];
    blake3::Hasher::new().update(&name.0).finalize_xof().fill(&mut payload);
    payload
}

fn troubles(random: &mut Random) -> Faults {
    let mut some = |most: usize| if random.below(2) == 0 { 0 } else { random.below(most) };
    Faults {
        flips: some(150),
        torn: some(150),
        misplaced: some(100),
        lost: some(100),
        errors: some(60),
        short: some(500),
        full_at: (some(2) > 0).then_some(9_000),
        free_bytes: (some(8) > 6).then_some(1_000),
    }
}

#[test]
fn the_last_bytes_of_a_disk_are_left_to_others() {
    let format = RecordFormat::new(&[1; 32], 16, BLOCK_BYTES);
    let file = FaultyFile::new(1);
    let store = Store::new(file.clone(), format, 9);
    let write = |slot, n| store.write(DiskSlot(slot), &name(n), &payload(&name(n)));
    write(0, 0).expect("there is room");
    file.set_faults(Faults { free_bytes: Some(FREE_BYTES_KEPT - 1), ..Faults::default() });
    let refused = write(1, 1).expect_err("the file would grow");
    assert_eq!(refused.kind(), std::io::ErrorKind::StorageFull);
    write(0, 2).expect("in the place of another");
    file.set_faults(Faults { free_bytes: Some(FREE_BYTES_KEPT), ..Faults::default() });
    write(1, 1).expect("there is room again");
}

#[test]
fn no_storm_serves_a_wrong_block() {
    let mut seen = Seen::default();
    for seed in 0..4_000 {
        let mut life = Life::new(seed);
        for _ in 0..3 {
            let faults = troubles(&mut life.random);
            life.file.set_faults(faults);
            (0..120).for_each(|_| life.act());
            let flips = life.random.below(4);
            life.file.rot(flips);
            life.restart();
        }
        // The trouble is over: what goes down now survives a restart, and comes up.
        life.file.set_faults(Faults::default());
        life.rest();
        life.now = life.now + Duration::from_secs(1_000);
        (100..104).for_each(|n| life.evict(n));
        life.rest();
        let tiers = begin(&life.file, life.format, life.disk_blocks, &mut life.random);
        life.count();
        life.tiers = tiers;
        life.rest();
        let before = life.seen.landed;
        life.fetch((100..104).map(name).collect(), LONG);
        life.rest();
        assert_eq!(life.seen.landed - before, 4, "seed {seed}");
        life.count();
        life.seen.after_restart += 4;
        add(&mut seen, &life.seen);
    }
    // The storms were storms.
    assert!(seen.landed > 40_000 && seen.from_disk > 20_000, "{seen:?}");
    assert!(seen.corrupt > 4_000 && seen.failed > 1_000, "{seen:?}");
}

fn add(all: &mut Seen, one: &Seen) {
    all.landed += one.landed;
    all.from_disk += one.from_disk;
    all.corrupt += one.corrupt;
    all.failed += one.failed;
    all.after_restart += one.after_restart;
}
