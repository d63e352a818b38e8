//! Blocks that another replica computed: the same tokens as undisturbed, and nothing is left over.

#[path = "../../node/tests/api/tiny_model.rs"]
mod tiny_model;

use cache::transfer::{Served, TransferId};
use cache::{BlockHash, BlockId};
use engine::model::Architecture;
use engine::replica::{Event, GenerateRequest, Replica, ServeEvent};
use protocol::transfer::{KvFirstToken, KvRefusal, KvWork};
use protocol::{Instant, NodeId, RequestId, TenantId, TokenId};

const PROMPT_TOKENS: u32 = 100;
const BLOCK_TOKENS: usize = 16;

#[test]
fn a_prefill_of_a_peer_gives_the_same_tokens() {
    let undisturbed = generate(&mut replica(), 1).1;
    let (mut prefiller, mut decoder) = (replica(), replica());
    let names = names(&prefiller);
    assert_eq!(names, self::names(&decoder), "one secret, one name");

    decoder.begin_hand_off(RequestId(1), names.clone());
    assert_eq!(decoder.blocks_known(&names), names.len(), "others wait for what is on its way");
    let pages = decoder.reserve_blocks(names.len());
    let pins = serve(&mut prefiller, asked(&names, prefill(prompt())));
    assert_eq!(pins.len(), names.len());
    copy(&prefiller, &pins, &mut decoder, &pages);
    let pairs: Vec<_> = pages.into_iter().zip(names).collect();
    decoder.attach_blocks(RequestId(1), &pairs);
    prefiller.release_blocks(&pins);

    let (cached, tokens) = generate(&mut decoder, 1);
    assert_eq!((cached, tokens), (pairs.len() * BLOCK_TOKENS, undisturbed));
    for replica in [&prefiller, &decoder] {
        assert_eq!(replica.stats().blocks_used, 0);
    }
}

#[test]
fn a_part_that_is_there_already_is_not_computed_again() {
    let mut prefiller = replica();
    let names = names(&prefiller);
    generate(&mut prefiller, 1);
    let computed = prefiller.stats().computed_tokens;
    let cached = Served { names: names[2..].to_vec(), first: 2, ..asked(&names, KvWork::Cached) };
    let pins = serve(&mut prefiller, cached);
    assert_eq!(pins.len(), names.len() - 2);
    prefiller.release_blocks(&pins);
    assert_eq!(prefiller.stats().computed_tokens, computed);
    // The whole of a prompt that is known, too.
    let pins = serve(&mut prefiller, asked(&names, prefill(prompt())));
    prefiller.release_blocks(&pins);
    assert_eq!((pins.len(), prefiller.stats().computed_tokens), (names.len(), computed));
    assert_eq!(prefiller.stats().blocks_used, 0);
}

#[test]
fn what_does_not_fit_is_declined() {
    let mut prefiller = replica();
    let names = names(&prefiller);
    let mut other = prompt();
    other[20] ^= 1;
    let short = prompt()[..50].to_vec();
    let strange = vec![TokenId::MAX; 100];
    let tenant = TenantId::new("other").expect("a tenant").as_str().to_owned();
    let foreign = KvWork::Prefill {
        tenant,
        tokens: prompt(),
        priority: 0,
        first_token: KvFirstToken::Receiver,
    };
    for (work, refusal) in [
        (prefill(other), KvRefusal::OtherNames),
        (prefill(short), KvRefusal::OtherNames),
        (prefill(strange), KvRefusal::Protocol),
        (foreign, KvRefusal::OtherNames),
    ] {
        prefiller.serve(Instant::ORIGIN, TransferId(1), asked(&names, work));
        let declined = ServeEvent::Declined { transfer: TransferId(1), refusal };
        assert_eq!(prefiller.take_serve_events(), [declined]);
        assert!(!prefiller.has_work());
    }
}

#[test]
fn a_prefill_that_nobody_wants_any_more_ends() {
    let mut prefiller = replica();
    let names = names(&prefiller);
    prefiller.serve(Instant::ORIGIN, TransferId(1), asked(&names, prefill(prompt())));
    assert!(prefiller.has_work());
    prefiller.unserve(Instant::ORIGIN, TransferId(1));
    assert!(!prefiller.has_work());
    assert_eq!(prefiller.take_serve_events(), []);
    // A client's cancellation does not reach a peer's prefill.
    prefiller.serve(Instant::ORIGIN, TransferId(2), asked(&names, prefill(prompt())));
    prefiller.cancel(Instant::ORIGIN, RequestId(1));
    assert!(prefiller.has_work());
}

#[test]
fn hand_offs_take_no_more_than_half_of_the_pool() {
    let mut decoder = replica();
    let blocks = decoder.executor().block_capacity();
    assert_eq!(decoder.reserve_blocks(blocks / 2 + 1), []);
    let half = decoder.reserve_blocks(blocks / 2);
    assert_eq!(half.len(), blocks / 2);
    assert_eq!(decoder.reserve_blocks(1), []);
    decoder.release_blocks(&half);
    assert_eq!(decoder.stats().blocks_used, 0);
}

fn replica() -> Replica {
    tiny_model::load(Architecture::Llama).0
}

fn prompt() -> Vec<TokenId> {
    (0..PROMPT_TOKENS).map(|i| (i * 7 + 3) % 200).collect()
}

fn names(replica: &Replica) -> Vec<BlockHash> {
    replica.namer().names(&TenantId::local(), &prompt())
}

fn prefill(tokens: Vec<TokenId>) -> KvWork {
    let tenant = TenantId::local().as_str().to_owned();
    KvWork::Prefill { tenant, tokens, priority: 0, first_token: KvFirstToken::Receiver }
}

fn asked(names: &[BlockHash], work: KvWork) -> Served {
    let peer = NodeId([1; 32]);
    Served { peer, request: RequestId(1), first: 0, names: names.to_vec(), work }
}

/// Serves one transfer to its end; the blocks that were pinned.
fn serve(replica: &mut Replica, served: Served) -> Vec<BlockId> {
    replica.serve(Instant::ORIGIN, TransferId(1), served);
    let mut pins = Vec::new();
    for _ in 0..1000 {
        for event in replica.take_serve_events() {
            match event {
                ServeEvent::Ready { blocks, .. } => pins.extend(blocks),
                ServeEvent::Finished { .. } => return pins,
                ServeEvent::Declined { refusal, .. } => panic!("declined: {refusal}"),
            }
        }
        let mut events = Vec::new();
        replica.step(&|| Instant::ORIGIN, &mut events);
        assert_eq!(events, [], "a peer's prefill says nothing to clients");
    }
    panic!("the prefill did not end");
}

fn copy(from: &Replica, pins: &[BlockId], to: &mut Replica, pages: &[BlockId]) {
    for (&pin, &page) in pins.iter().zip(pages) {
        let payload = from.block_payload(pin).expect("a block").to_vec();
        let (begin, end) = payload.split_at(payload.len() / 3);
        to.write_block(page, &[begin, end]).expect("a block of the same layout");
    }
}

/// Cached tokens and answer of a greedy request.
fn generate(replica: &mut Replica, request: u128) -> (usize, Vec<TokenId>) {
    let request = GenerateRequest {
        max_tokens: Some(20),
        ignore_eos: true,
        ..GenerateRequest::new(RequestId(request), prompt())
    };
    let id = request.request;
    replica.generate(Instant::ORIGIN, request).expect("a valid request");
    replica.end_hand_off(id);
    let (mut cached, mut tokens, mut events) = (0, Vec::new(), Vec::new());
    while replica.has_work() {
        replica.step(&|| Instant::ORIGIN, &mut events);
    }
    for (_, event) in events {
        match event {
            Event::Started { cached_tokens, .. } => cached = cached_tokens,
            Event::Token { sampled, .. } => tokens.push(sampled.token),
            _ => {}
        }
    }
    (cached, tokens)
}
