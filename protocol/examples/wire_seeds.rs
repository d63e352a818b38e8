//! Small valid inputs for the fuzz targets, into `fuzz/corpus/TARGET/`: `cargo run -p grapevine-protocol
//! --example wire_seeds [FOLDER]`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::backup::{Begin, Fetch, Fetched, Keep};
use protocol::directory::{
    Events, Found, Heard, Holder, News, Part, Piece, Query, Report, ShortName, Sum,
};
use protocol::forward::{Endpoint, Forward, ForwardReply};
use protocol::frame::{Frame, Kind};
use protocol::identity::greeting::{Greeting, GreetingInput, GreetingOutput};
use protocol::identity::join::{
    ChannelBinding, Contact, Issuer, IssuerInput, IssuerOutput, IssuerPlace, Joiner, JoinerInput,
    JoinerOutput, Purpose,
};
use protocol::identity::{Invite, NodeKey, Roles, Trust, UnixTime};
use protocol::journal::{self, Ended, Entry, StreamPart};
use protocol::membership::Addresses;
use protocol::membership::wire::{BUCKETS, Body, Datagram, FLAG_UNKNOWN, Update, VERSION};
use protocol::node_record::{NodeRecord, NodeRole, ReplicaRecord, ReplicaState};
use protocol::transfer::{
    KvAsk, KvChunk, KvCommit, KvDtype, KvEnd, KvFirstToken, KvFormat, KvPart, KvProgress,
    KvRefusal, KvStream, KvWork,
};
use protocol::{Instant, Machine, NodeId};

const NOW: UnixTime = UnixTime(1_800_000_000);

fn main() -> std::io::Result<()> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let corpus = std::env::args_os().nth(1).map_or(default, PathBuf::from);
    let frames = exchanges();
    let encoded: Vec<Vec<u8>> = frames.iter().map(Frame::encode).collect();
    put(&corpus, "frame", &encoded)?;
    let mut joins: Vec<Vec<u8>> = frames.iter().map(for_join).collect();
    joins.push(joins.concat());
    put(&corpus, "join", &joins)?;
    put(&corpus, "token", &[invite(&trust()).to_string().into_bytes()])?;
    put(&corpus, "datagram", &datagrams())?;
    put(&corpus, "records", &records())?;
    put(&corpus, "forward", &heads())?;
    put(&corpus, "transfer", &transfers())?;
    put(&corpus, "journal", &journals())?;
    put(&corpus, "directory", &directory())
}

fn put(corpus: &Path, target: &str, seeds: &[Vec<u8>]) -> std::io::Result<()> {
    let folder = corpus.join(target);
    std::fs::create_dir_all(&folder)?;
    for (number, seed) in seeds.iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{number}")), seed)?;
    }
    println!("{}: {} seeds", folder.display(), seeds.len());
    Ok(())
}

fn key(n: u8) -> NodeKey {
    NodeKey::from_secret([n; 32])
}

fn trust() -> Trust {
    Trust::found(&key(0), key(1).id(), NOW)
}

fn invite(trust: &Trust) -> Invite {
    let grant = (Roles::ALL, 1, NOW.plus(60));
    let seeds = vec!["192.0.2.1:1".parse().expect("an address")];
    Invite::new(trust, &key(1), [9; 32], grant, seeds, NOW).expect("a token")
}

/// Every frame of a join by token and of a greeting. Their channel is not the one of the fuzz targets,
/// where nobody may be let in.
fn exchanges() -> Vec<Frame> {
    let (trust, start) = (trust(), Instant::ORIGIN);
    let certificate = |n| trust.issue(&key(1), key(n).id(), Roles::ALL, 1, NOW).expect("granted");
    let tls = ChannelBinding([8; 32]);
    let contact = Contact { node: key(1).id(), addresses: invite(&trust).seeds };
    let place = IssuerPlace {
        key: key(1),
        trust: Arc::new(trust.clone()),
        certificate: certificate(1),
        contacts: vec![contact],
        nonce: [1; 32],
        serial: 1,
    };
    let mut issuer = Issuer::new(start, place, (key(5).id(), tls));
    let purpose = Purpose::Invite(invite(&trust));
    let (mut joiner, hello) = Joiner::new(start, purpose, key(5), (key(1).id(), tls), [2; 32]);
    let mut frames = vec![hello.clone()];
    let mut to_issuer = vec![IssuerInput::Frame { frame: hello, wall: NOW }];
    while let Some(input) = to_issuer.pop() {
        let mut out = Vec::new();
        issuer.handle(start, input, &mut out);
        for output in out {
            match output {
                IssuerOutput::Redeem(_) => {
                    to_issuer.push(IssuerInput::Redeemed { result: Ok(()), wall: NOW });
                }
                IssuerOutput::Send(frame) => {
                    frames.push(frame.clone());
                    let mut back = Vec::new();
                    joiner.handle(start, JoinerInput::Frame { frame, wall: NOW }, &mut back);
                    for output in back {
                        if let JoinerOutput::Send(frame) = output {
                            frames.push(frame.clone());
                            to_issuer.push(IssuerInput::Frame { frame, wall: NOW });
                        }
                    }
                }
                _ => {}
            }
        }
    }
    let (mut one, hello) = Greeting::new(start, trust.clone(), certificate(5), key(6).id());
    let (_, other) = Greeting::new(start, trust.clone(), certificate(6), key(5).id());
    frames.push(hello);
    frames.push(other.clone());
    let mut out = Vec::new();
    one.handle(start, GreetingInput::Frame { frame: other, wall: NOW }, &mut out);
    frames.extend(out.into_iter().filter_map(|output| match output {
        GreetingOutput::Send(frame) => Some(frame),
        _ => None,
    }));
    frames
}

/// As the target `join` reads a frame.
fn for_join(frame: &Frame) -> Vec<u8> {
    let [low, high] = frame.kind.0.to_le_bytes();
    let length = u16::try_from(frame.body.len()).expect("frames of joins are small").to_le_bytes();
    [&[low, high, length[0], length[1]], &frame.body[..]].concat()
}

/// One of each kind, and conversations as the target's node hears them.
fn datagrams() -> Vec<Vec<u8>> {
    let id = |n: u8| NodeId([n; 32]);
    let contact = Addresses::new(["192.0.2.1:1".parse().expect("an address")]).expect("few");
    let alive = |n, incarnation, version| Update::Alive {
        id: id(n),
        incarnation,
        version,
        contact: contact.clone(),
    };
    let bodies = [
        Body::Gossip,
        Body::Ping { probe: 1 },
        Body::Ack { probe: 1 },
        Body::PingRequest { probe: 1, target: id(5) },
        Body::RelayedAck { probe: 1 },
        Body::Nack { probe: 2 },
        Body::Sync { root: 7, members: 1 },
        Body::Digest { buckets: vec![3; BUCKETS * 4] },
        Body::Want { buckets: [255; BUCKETS / 8] },
        Body::Entries,
    ];
    let updates = [
        vec![],
        vec![alive(3, 1, 1), alive(20, 0, 0)],
        vec![Update::Suspect { id: id(5), incarnation: 0, accusers: vec![id(2), id(3)] }],
        vec![Update::Dead { id: id(5), incarnation: 0 }, alive(5, 2, 0)],
        vec![
            Update::Left { id: id(6), incarnation: 0 },
            Update::Dead { id: id(0), incarnation: 0 },
        ],
    ];
    let mut single = Vec::new();
    for (flags, body) in [0, FLAG_UNKNOWN].into_iter().cycle().zip(bodies) {
        for updates in &updates {
            let (body, updates) = (body.clone(), updates.clone());
            let datagram = Datagram { version: VERSION, flags, incarnation: 1, body, updates };
            single.push(datagram.encode());
        }
    }
    let heard = |(n, datagram): (usize, &Vec<u8>)| {
        let length = (datagram.len() as u16).to_le_bytes();
        [&[(n % 8) as u8 + 1, (n * 37) as u8, length[0], length[1]], &datagram[..]].concat()
    };
    let conversation: Vec<Vec<u8>> = single.iter().enumerate().map(heard).collect();
    let talks: Vec<Vec<u8>> = conversation.chunks(5).map(|talk| talk.concat()).collect();
    single.into_iter().chain(talks).collect()
}

fn records() -> Vec<Vec<u8>> {
    let replica = ReplicaRecord {
        model: "demo".to_owned(),
        fingerprint: "f".repeat(64),
        state: ReplicaState::Ready,
        created_s: 1_800_000_000,
        context_tokens_max: 4096,
        running: 3,
        waiting: 300,
        prompt_tokens: 100_000,
        prefill_rate: 1000,
        kv_blocks_free: 5,
        kv_blocks: 70_000,
        decode_step_us: 20_000,
        kv_bytes_per_token: 12_288,
        below_ns_per_token: Some(60_000),
    };
    let record = |replicas: usize| NodeRecord {
        name: "host".to_owned(),
        version: "0.1.0".to_owned(),
        overlay: vec!["192.0.2.1:1".parse().expect("v4"), "[2001:db8::1]:2".parse().expect("v6")],
        api: vec!["192.0.2.1:3".parse().expect("v4")],
        memory_bytes_per_s: 1 << 40,
        int8_ops_per_s: 1,
        draining: replicas == 1,
        role: NodeRole::ALL[replicas % 3],
        replicas: vec![replica.clone(); replicas],
    };
    [0, 1, 2, 12].map(|n| record(n).to_bytes().0).to_vec()
}

fn heads() -> Vec<Vec<u8>> {
    let forward = |endpoint, traceparent: Option<&str>| Forward {
        request: u128::MAX / 3,
        endpoint,
        tenant: "acme".to_owned(),
        traceparent: traceparent.map(str::to_owned),
        deadline_ms: 60_000,
        created: 1_800_000_000,
        body_bytes: 1 << 20,
        journal_bytes: 300,
        first_event: 17,
    };
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let reply = |code: Option<&str>| ForwardReply {
        status: 429,
        content_type: "application/json".to_owned(),
        retry_after_s: code.map(|_| 3),
        code: code.map(str::to_owned),
    };
    vec![
        forward(Endpoint::Chat, Some(trace)).to_bytes(),
        forward(Endpoint::Embeddings, None).to_bytes(),
        reply(Some("rate_limited")).to_bytes(),
        reply(None).to_bytes(),
    ]
}

/// One of each frame of a transfer.
fn transfers() -> Vec<Vec<u8>> {
    let format = KvFormat {
        identity: [7; 32],
        layer_first: 0,
        layers: 24,
        block_tokens: 16,
        dtype: KvDtype::F16,
        block_bytes: 196_608,
    };
    let ask = |work| KvAsk {
        request: u128::MAX / 3,
        attempt: 300,
        format,
        first: 2,
        wanted: vec![[9; 32]; 3],
        deadline_ms: 5000,
        streams: 4,
        work,
    };
    let prefill = KvWork::Prefill {
        tenant: "acme".to_owned(),
        tokens: vec![1, 300, 70_000],
        priority: -1,
        first_token: KvFirstToken::Greedy,
    };
    let end = Some(KvEnd { first_token: Some(6), cached: 3 });
    let frames = [
        Frame::new(Kind::KV_ASK, &ask(KvWork::Cached)),
        Frame::new(Kind::KV_ASK, &ask(prefill)),
        Frame::new(Kind::KV_ACCEPT, &()),
        Frame::new(Kind::KV_REFUSAL, &KvRefusal::OtherDtype { theirs: KvDtype::Bf16 }),
        Frame::new(Kind::KV_PROGRESS, &KvProgress { ready: 300 }),
        Frame::new(Kind::KV_STREAM, &KvStream { request: 7, attempt: 300, parts: 4 }),
        Frame::new(Kind::KV_PART, &KvPart { request: 7, attempt: 300, part: 3 }),
        Frame::new(Kind::KV_CHUNK, &KvChunk { first: 4, blocks: 2 }),
        Frame::new(Kind::KV_COMMIT, &KvCommit { first: 4, digests: vec![[8; 32]; 2], end }),
    ];
    frames.iter().map(Frame::encode).collect()
}

fn journals() -> Vec<Vec<u8>> {
    let top = vec![(7, -0.5), (300, -1.5)];
    let entries = vec![
        Entry::Started { prompt: 0, cached_tokens: 32 },
        Entry::Token { choice: 0, token: 151_000, logprob: 0.0, top: Vec::new() },
        Entry::Token { choice: 1, token: 7, logprob: -0.5, top },
        Entry::Finished { choice: 1, reason: Ended::Stop },
    ];
    let text = b"id: req-1:0\ndata: {}\n\n".to_vec();
    let part = StreamPart { is_whole: true, next_event: 1, entries: entries.clone(), text };
    let begin = Begin {
        endpoint: Endpoint::Completions,
        created: 1_800_000_000,
        weights: 7,
        body: br#"{"model":"m","prompt":"x","stream":true}"#.to_vec(),
    };
    let (tenant, request) = ("acme".to_owned(), u128::MAX / 3);
    let keep = Keep {
        tenant: tenant.clone(),
        request,
        begin: Some(begin.clone()),
        from: 0,
        entries: entries.clone(),
        is_complete: false,
    };
    vec![
        journal::to_bytes(&entries),
        part.to_bytes(),
        keep.to_bytes(),
        Fetch { tenant, request, from: 3 }.to_bytes(),
        Fetched { begin: Some(begin), entries, total: 4 }.to_bytes(),
    ]
}

fn directory() -> Vec<Vec<u8>> {
    let name = |n: u64| ShortName::from_number(n << 60);
    let names: Vec<ShortName> = (1..4).map(name).collect();
    let mut events = Events::default();
    (1..12).for_each(|n| events.push(name(n), n % 3 == 0));
    let part = Part::of([7; 32], 4, name(9));
    let piece = Some(Piece { first: name(1), last: name(5), names: names.clone() });
    let sum = Some(Sum { names: 300, xor: u64::MAX / 3 });
    let news = News::Blocks { first: 70_000, events, piece, sum };
    let holders = vec![
        Holder { node: NodeId([8; 32]), blocks: 300 },
        Holder { node: NodeId([9; 32]), blocks: 2 },
    ];
    vec![
        Report { part, epoch: u64::MAX / 7, news }.to_bytes(),
        Report { part, epoch: 1, news: News::Gone }.to_bytes(),
        Heard::Known { next: 70_011, missing: Some(name(6)) }.to_bytes(),
        Heard::Busy { retry_ms: 200 }.to_bytes(),
        Query { part, names, holders_max: 16 }.to_bytes(),
        Found { nodes: 3, holders }.to_bytes(),
    ]
}
