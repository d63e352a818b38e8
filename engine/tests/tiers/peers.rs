//! What lies below the pool is told to others and served to them.

use std::collections::BTreeSet;

use super::model::{answer, answers, on_disk, prompt, replica, rest, with_tiers};
use cache::transfer::{Served, TransferId};
use cache::{BlockHash, BlockId, NameChange};
use engine::replica::{Replica, ServeEvent};
use engine::tiers::{DiskOptions, TiersOptions};
use protocol::transfer::{KvFirstToken, KvRefusal, KvWork};
use protocol::{Instant, NodeId, RequestId, TenantId};

/// More than the pool has room for.
const PROMPTS: u32 = 60;
/// Full blocks of one of them.
const BLOCKS: usize = 6;

#[test]
fn a_peer_gets_what_was_spilled_to_host_memory() {
    let mut holder = replica();
    with_tiers(&mut holder, TiersOptions { host_bytes: 64 << 20, disk: None });
    answers(&mut holder, PROMPTS);
    check_served(&mut holder);
    assert!(holder.tier_stats().expect("tiers").host.hits >= BLOCKS as u64);
}

#[test]
fn a_peer_gets_what_was_spilled_to_disk_also_after_a_restart() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut holder = on_disk(folder.path());
    answers(&mut holder, PROMPTS);
    check_served(&mut holder);
    drop(holder);
    let mut holder = on_disk(folder.path());
    check_served(&mut holder);
    assert_eq!(holder.tier_stats().expect("tiers").disk.hits, BLOCKS as u64);
}

/// The oldest prompt, which the pool has forgotten, goes to another replica, which then says what an
/// undisturbed one says.
fn check_served(holder: &mut Replica) {
    let fresh = answer(&mut replica(), TenantId::local(), 0);
    let names = names(holder, &TenantId::local(), 0);
    let computed = holder.stats().computed_tokens;
    let (pins, end) = serve(holder, asked(&names, KvWork::Cached));
    assert_eq!((pins.len(), end), (BLOCKS, Ok(BLOCKS)));
    assert_eq!(holder.stats().computed_tokens, computed);

    let mut peer = replica();
    let pages = peer.reserve_blocks(BLOCKS);
    for (&pin, &page) in pins.iter().zip(&pages) {
        let payload = holder.block_payload(pin).expect("a block");
        peer.write_block(page, &[payload]).expect("a block of the same layout");
    }
    let request = RequestId(0);
    peer.begin_hand_off(request, names.clone());
    let pairs: Vec<_> = pages.into_iter().zip(names).collect();
    peer.attach_blocks(request, &pairs);
    peer.end_hand_off(request);
    assert_eq!(answer(&mut peer, TenantId::local(), 0), (BLOCKS * 16, fresh.1));
    holder.release_blocks(&pins);
    assert_eq!(holder.stats().blocks_used, 0, "nothing is left over");
}

#[test]
fn a_prefill_for_a_peer_computes_what_no_tier_has() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut holder = on_disk(folder.path());
    answers(&mut holder, PROMPTS);
    // As prompt 0 but for its last full block.
    let mut tokens = prompt(0);
    tokens[85] ^= 1;
    let local = TenantId::local();
    let names = holder.namer().names(&local, &tokens);
    let tenant = local.as_str().to_owned();
    let work = KvWork::Prefill { tenant, tokens, priority: 0, first_token: KvFirstToken::Receiver };
    let computed = holder.stats().computed_tokens;
    let (pins, end) = serve(&mut holder, asked(&names, work));
    assert_eq!((pins.len(), end), (BLOCKS, Ok(BLOCKS - 1)));
    assert_eq!(holder.stats().computed_tokens - computed, 16);
    holder.release_blocks(&pins);
    assert_eq!(holder.stats().blocks_used, 0);
}

#[test]
fn another_tenant_gets_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut holder = on_disk(folder.path());
    answers(&mut holder, PROMPTS);
    let other = TenantId::new("other").expect("a tenant");
    let names = names(&holder, &other, 0);
    assert_eq!(serve(&mut holder, asked(&names, KvWork::Cached)), (Vec::new(), Ok(0)));
    assert_eq!(holder.tier_stats().expect("tiers").disk.hits, 0);
}

#[test]
fn who_does_not_want_it_any_more_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut holder = on_disk(folder.path());
    answers(&mut holder, PROMPTS);
    let names = names(&holder, &TenantId::local(), 0);
    holder.serve(Instant::ORIGIN, TransferId(1), asked(&names, KvWork::Cached));
    // The disk may have been quicker than this thread: what has come is the peer's to let go.
    for event in holder.take_serve_events() {
        if let ServeEvent::Ready { blocks, .. } = event {
            holder.release_blocks(&blocks);
        }
    }
    holder.unserve(Instant::ORIGIN, TransferId(1));
    rest(&mut holder);
    assert_eq!(holder.take_serve_events(), []);
    assert_eq!(holder.stats().blocks_used, 0);
    // The names are nobody's claim: a request has them from disk.
    assert_eq!(answer(&mut holder, TenantId::local(), 0).0, BLOCKS * 16);
}

#[test]
fn two_peers_and_a_request_want_the_same_at_once() {
    let fresh = answer(&mut replica(), TenantId::local(), 0);
    let folder = tempfile::tempdir().expect("a folder");
    let mut holder = on_disk(folder.path());
    answers(&mut holder, PROMPTS);
    let names = names(&holder, &TenantId::local(), 0);
    for id in [1, 2] {
        holder.serve(Instant::ORIGIN, TransferId(id), asked(&names, KvWork::Cached));
    }
    assert_eq!(answer(&mut holder, TenantId::local(), 0), (BLOCKS * 16, fresh.1));
    let mut pins = Vec::new();
    for event in holder.take_serve_events() {
        match event {
            ServeEvent::Ready { blocks, .. } => pins.extend(blocks),
            ServeEvent::Finished { cached, .. } => assert_eq!(cached, BLOCKS),
            ServeEvent::Declined { refusal, .. } => panic!("declined: {refusal}"),
        }
    }
    assert_eq!(pins.len(), 2 * BLOCKS);
    assert_eq!(holder.tier_stats().expect("tiers").disk.hits, BLOCKS as u64, "read once");
    holder.release_blocks(&pins);
    assert_eq!(holder.stats().blocks_used, 0);
}

#[test]
fn others_are_told_of_what_lies_below() {
    let folder = tempfile::tempdir().expect("a folder");
    // A disk that forgets, too.
    let small = |replica: &mut Replica| {
        let bytes = 200 * replica.record_format().record_bytes() as u64;
        let disk = DiskOptions { folder: folder.path().to_owned(), bytes };
        with_tiers(replica, TiersOptions { host_bytes: 0, disk: Some(disk) });
    };
    let mut told = BTreeSet::new();
    let mut holder = replica();
    small(&mut holder);
    holder.watch_names();
    let check = |holder: &mut Replica, told: &mut BTreeSet<BlockHash>| {
        for change in holder.take_name_changes() {
            match change {
                NameChange::Stored(name) => told.insert(name),
                NameChange::Removed(name) => told.remove(&name),
            };
        }
        for n in 0..PROMPTS {
            for name in names(holder, &TenantId::local(), n) {
                assert_eq!(told.contains(&name), holder.blocks_known(&[name]) == 1, "prompt {n}");
            }
        }
    };
    for n in 0..PROMPTS {
        answer(&mut holder, TenantId::local(), n);
        check(&mut holder, &mut told);
    }
    let stats = holder.tier_stats().expect("tiers");
    assert!(told.len() > holder.executor().block_capacity(), "more than the pool: {}", told.len());
    assert!(stats.disk.dropped > 0, "the disk forgets: {stats:?}");
    drop(holder);
    // After a restart: all that the disk has, though nobody watched when that was found.
    let mut holder = replica();
    small(&mut holder);
    rest(&mut holder);
    holder.watch_names();
    told.clear();
    check(&mut holder, &mut told);
    assert_eq!(told.len(), holder.tier_stats().expect("tiers").disk.blocks);
}

fn names(replica: &Replica, tenant: &TenantId, n: u32) -> Vec<BlockHash> {
    replica.namer().names(tenant, &prompt(n))
}

fn asked(names: &[BlockHash], work: KvWork) -> Served {
    let peer = NodeId([1; 32]);
    Served { peer, request: RequestId(1), first: 0, names: names.to_vec(), work }
}

/// Serves one transfer to its end: what was pinned, and how much of it was cached.
fn serve(replica: &mut Replica, served: Served) -> (Vec<BlockId>, Result<usize, KvRefusal>) {
    replica.serve(Instant::ORIGIN, TransferId(1), served);
    let (mut pins, mut events) = (Vec::new(), Vec::new());
    for _ in 0..1_000_000 {
        for event in replica.take_serve_events() {
            match event {
                ServeEvent::Ready { blocks, .. } => pins.extend(blocks),
                ServeEvent::Finished { cached, .. } => return (pins, Ok(cached)),
                ServeEvent::Declined { refusal, .. } => return (pins, Err(refusal)),
            }
        }
        // As the node does it: no step without a sequence.
        if replica.has_work() {
            replica.step(&|| Instant::ORIGIN, &mut events);
        } else {
            replica.idle(Instant::ORIGIN);
        }
        assert_eq!(events, [], "nothing is said to clients");
        std::thread::yield_now();
    }
    panic!("the transfer did not end");
}
