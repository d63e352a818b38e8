//! Below a real model: what went down and came up again changes no bit of an answer, over restarts and
//! over damage.

use super::tiny_model;
use engine::model::Architecture;
use engine::replica::{Event, GenerateRequest, Replica};
use engine::tiers::{DiskOptions, Finding, KvTiers, TiersOptions};
use protocol::{Instant, RequestId, TenantId, TokenId};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// More than the pool has room for.
const PROMPTS: u32 = 60;
const PROMPT_TOKENS: u32 = 100;
/// What a prompt can have from the cache: its full blocks.
const CACHED: usize = 96;

/// Cached tokens, and each token with the bits of its log-probability.
pub(super) type Answer = (usize, Vec<(TokenId, u32)>);

#[test]
fn a_spill_to_host_memory_changes_no_bit() {
    let fresh = answers(&mut replica(), PROMPTS);
    let mut replica = replica();
    with_tiers(&mut replica, TiersOptions { host_bytes: 64 << 20, disk: None });
    assert_eq!(answers(&mut replica, PROMPTS), fresh);
    assert!(replica.stats().evictions > 0, "the pool is too small for all of it");
    check_cached(&answers(&mut replica, PROMPTS), &fresh, PROMPTS as usize);
    let stats = replica.tier_stats().expect("tiers");
    assert!(stats.host.hits > 100 && stats.disk.stored == 0, "{stats:?}");
    assert_eq!(replica.stats().blocks_used, 0, "nothing is left over");
}

#[test]
fn a_small_host_tier_forgets_and_computes() {
    let fresh = answers(&mut replica(), PROMPTS);
    let mut replica = replica();
    let block_bytes = replica.executor().block_bytes();
    with_tiers(&mut replica, TiersOptions { host_bytes: 20 * block_bytes, disk: None });
    for _ in 0..2 {
        let again = answers(&mut replica, PROMPTS);
        check_cached(&again, &fresh, 0);
    }
    let stats = replica.tier_stats().expect("tiers");
    assert_eq!(stats.host.blocks, 20);
    assert!(stats.host.dropped > 100, "{stats:?}");
}

#[test]
fn the_disk_survives_a_restart() {
    let fresh = answers(&mut replica(), PROMPTS);
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = on_disk(folder.path());
    assert_eq!(answers(&mut first, PROMPTS), fresh);
    check_cached(&answers(&mut first, PROMPTS), &fresh, PROMPTS as usize);
    let stats = first.tier_stats().expect("tiers");
    assert!(stats.disk.hits > 100 && stats.disk.dropped == 0, "{stats:?}");
    assert_eq!(first.stats().blocks_used, 0, "nothing is left over");
    drop(first);

    let mut second = on_disk(folder.path());
    check_cached(&answers(&mut second, PROMPTS), &fresh, PROMPTS as usize);
    assert_eq!(second.take_findings(), []);
    // Another tenant has the same words and none of the blocks.
    let other = TenantId::new("other").expect("a tenant");
    let (cached, tokens) = answer(&mut second, other, 3);
    assert_eq!((cached, tokens), (0, fresh[3].1.clone()));
}

#[test]
fn damage_costs_time_and_nothing_else() {
    let fresh = answers(&mut replica(), PROMPTS);
    let folder = tempfile::tempdir().expect("a folder");
    drop(answers(&mut on_disk(folder.path()), PROMPTS));
    let path = file(folder.path());
    let mut bytes = std::fs::read(&path).expect("the file");
    for at in (0..bytes.len()).step_by(30_011) {
        bytes[at] ^= 0x10;
    }
    bytes.truncate(bytes.len() * 9 / 10 + 77);
    std::fs::write(&path, bytes).expect("it is written");

    let mut replica = on_disk(folder.path());
    check_cached(&answers(&mut replica, PROMPTS), &fresh, 0);
    let stats = replica.tier_stats().expect("tiers");
    assert!(stats.disk.corrupt > 5 && stats.disk.hits > 20, "{stats:?}");
    let findings = replica.take_findings();
    assert!(matches!(findings[0], Finding::Damaged { .. }), "{findings:?}");
    assert!(findings.len() <= 11, "few are told one by one: {findings:?}");
    let text = findings[0].to_string();
    assert!(text.contains("blocks.kv at byte "), "{text}");
    // Damage is found where it is read. Once all has been read, what was damaged is written anew.
    check_cached(&answers(&mut replica, PROMPTS), &fresh, 0);
    drop(replica);
    check_cached(&answers(&mut on_disk(folder.path()), PROMPTS), &fresh, PROMPTS as usize);
}

#[test]
fn a_disk_that_cannot_be_used_is_a_finding() {
    let folder = tempfile::tempdir().expect("a folder");
    let first = on_disk(folder.path());
    // Another process has it.
    let mut second = on_disk(folder.path());
    let findings = second.take_findings();
    assert!(matches!(findings[..], [Finding::Unusable { .. }]), "{findings:?}");
    assert!(findings[0].to_string().contains("another process"), "{findings:?}");
    answers(&mut second, 2);
    drop(first);
    // Something else lies there.
    let plain = folder.path().join("plain");
    std::fs::write(&plain, "not a folder").expect("it is written");
    let mut third = on_disk(&plain);
    assert!(matches!(third.take_findings()[..], [Finding::Unusable { .. }]));
    answers(&mut third, 2);
}

#[test]
fn the_folder_is_private_and_has_one_format() {
    let folder = tempfile::tempdir().expect("a folder");
    let of_another = folder.path().join("0123456789abcdef0123456789abcdef");
    let strange = folder.path().join("somebody's");
    for path in [&of_another, &strange] {
        std::fs::create_dir(path).expect("a folder");
        std::fs::write(path.join("blocks.kv"), "old").expect("a file");
    }
    drop(on_disk(folder.path()));
    assert!(!of_another.exists() && strange.join("blocks.kv").exists());
    let path = file(folder.path());
    let mode = |path: &Path| path.metadata().expect("it is there").permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().expect("a folder")), 0o700);
    // Also where it was not.
    std::fs::set_permissions(&path, Permissions::from_mode(0o644)).expect("its owner may");
    drop(on_disk(folder.path()));
    assert_eq!(mode(&path), 0o600);
}

#[test]
fn smaller_bounds_cut_the_file() {
    let fresh = answers(&mut replica(), 10);
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = on_disk(folder.path());
    assert_eq!(answers(&mut first, 10), fresh);
    let record_bytes = first.record_format().record_bytes() as u64;
    drop(first);
    let path = file(folder.path());
    assert!(path.metadata().expect("it is there").len() > 30 * record_bytes);
    let mut second = replica();
    let disk = DiskOptions { folder: folder.path().to_owned(), bytes: 30 * record_bytes };
    with_tiers(&mut second, TiersOptions { host_bytes: 0, disk: Some(disk) });
    check_cached(&answers(&mut second, 10), &fresh, 0);
    let stats = second.tier_stats().expect("tiers");
    assert!(stats.disk.hits > 10 && stats.disk.blocks == 30, "{stats:?}");
    assert!(path.metadata().expect("it is there").len() <= 30 * record_bytes);
}

pub(super) fn replica() -> Replica {
    tiny_model::load(Architecture::Llama).0
}

pub(super) fn with_tiers(replica: &mut Replica, options: TiersOptions) {
    let tiers = KvTiers::open(&options, replica.record_format()).expect("tiers are asked for");
    replica.set_tiers(tiers);
    rest(replica);
}

/// No host memory but the buffer, and a disk for everything.
pub(super) fn on_disk(folder: &Path) -> Replica {
    let mut replica = replica();
    let disk = DiskOptions { folder: folder.to_owned(), bytes: 64 << 20 };
    with_tiers(&mut replica, TiersOptions { host_bytes: 0, disk: Some(disk) });
    replica
}

/// The one file in a folder of one model.
fn file(folder: &Path) -> PathBuf {
    let is_ours = |path: &PathBuf| path.file_name().is_some_and(|name| name.len() == 32);
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut found = entries.map(|entry| entry.expect("an entry").path()).filter(is_ours);
    found.next().expect("a folder of a format").join("blocks.kv")
}

pub(super) fn prompt(n: u32) -> Vec<TokenId> {
    (0..PROMPT_TOKENS).map(|i| (i * 7 + n * 13 + i * n) % 200).collect()
}

pub(super) fn answers(replica: &mut Replica, prompts: u32) -> Vec<Answer> {
    (0..prompts).map(|n| answer(replica, TenantId::local(), n)).collect()
}

/// What a greedy request says; then the disk writes what it will.
pub(super) fn answer(replica: &mut Replica, tenant: TenantId, n: u32) -> Answer {
    let request = GenerateRequest {
        max_tokens: Some(6),
        ignore_eos: true,
        tenant,
        ..GenerateRequest::new(RequestId(u128::from(n)), prompt(n))
    };
    replica.generate(Instant::ORIGIN, request).expect("a valid request");
    let (mut cached, mut tokens, mut events) = (0, Vec::new(), Vec::new());
    while replica.has_work() {
        if replica.step(&|| Instant::ORIGIN, &mut events).is_none() {
            std::thread::yield_now();
        }
    }
    for (_, event) in events {
        match event {
            Event::Started { cached_tokens, .. } => cached = cached_tokens,
            Event::Token { sampled, .. } => {
                tokens.push((sampled.token, sampled.logprob.to_bits()));
            }
            _ => {}
        }
    }
    rest(replica);
    (cached, tokens)
}

pub(super) fn rest(replica: &mut Replica) {
    while replica.idle(Instant::ORIGIN) {
        std::thread::yield_now();
    }
}

/// The same tokens and probabilities, and of at least so many prompts all that can be cached was.
fn check_cached(answers: &[Answer], fresh: &[Answer], whole_min: usize) {
    for (answer, fresh) in answers.iter().zip(fresh) {
        assert_eq!(answer.1, fresh.1);
    }
    let whole = answers.iter().filter(|answer| answer.0 == CACHED).count();
    assert!(whole >= whole_min, "{whole} prompts were cached: {:?}", cached(answers));
}

fn cached(answers: &[Answer]) -> Vec<usize> {
    answers.iter().map(|answer| answer.0).collect()
}
