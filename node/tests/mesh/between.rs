//! Who sits between two nodes, or says again what another has said.

use std::time::Duration;

use protocol::frame::{Frame, Kind};
use protocol::identity::greeting::Greeting;
use protocol::identity::join::{Joiner, JoinerInput, JoinerOutput, Purpose};
use protocol::identity::{Invite, UnixTime};
use protocol::{Instant, Machine};

use super::raw::{Raw, binding, next_frame};
use super::support::{START, TestClock, TestNode, limits, start_at, until};

/// Passes the frames of one stream on, in both directions, between a node that dialled `middle` and the
/// node at `target`. Gives the kinds of the frames that went through.
async fn pass_on(middle: &Raw, target: std::net::SocketAddr) -> Vec<Kind> {
    let from_joiner = middle.endpoint.accept().await.unwrap().await.unwrap();
    let (mut to_joiner, mut joiner) = from_joiner.accept_bi().await.unwrap();
    let to_issuer = middle.dial(target).await;
    let (mut issuer_in, mut issuer) = to_issuer.open_bi().await.unwrap();
    let mut kinds = Vec::new();
    loop {
        let (frame, onwards) = tokio::select! {
            frame = next_frame(&mut joiner) => (frame, &mut issuer_in),
            frame = next_frame(&mut issuer) => (frame, &mut to_joiner),
        };
        // Who ends its side ends the other.
        let Some(frame) = frame else { break };
        kinds.push(frame.kind);
        if onwards.write_all(&frame.encode()).await.is_err() {
            break;
        }
    }
    to_issuer.close(0u32.into(), b"");
    from_joiner.close(0u32.into(), b"");
    kinds
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_man_in_the_middle_gets_nothing() {
    let clock = TestClock::new();
    let a = TestNode::start(None, &clock).await;
    let token = a.token(1);
    // The joiner believes that the node is where the man in the middle listens.
    let middle = Raw::new(77);
    let mut misled: Invite = token.parse().unwrap();
    misled.seeds = vec![middle.address()];
    let misled = misled.to_string();
    let data = tempfile::tempdir().unwrap();
    let joining = start_at(data.path(), Some(&misled), &clock, limits());
    let (kinds, joined) = tokio::join!(pass_on(&middle, a.mesh.address()), joining);
    let why = joined.err().expect("nobody joins through him").to_string();
    assert!(why.contains("somebody may stand in between"), "{why}");
    // He saw the mesh's proof, which is for him alone, and neither a token's signature nor a certificate.
    assert_eq!(kinds, [Kind::JOIN_HELLO, Kind::JOIN_PROOF]);
    until("counted", || a.count("joins_refused") == 1).await;
    assert_eq!(a.count("certificates_granted"), 0);
    // The token is as good as before, and so is the node.
    let (b, _) = start_at(data.path(), Some(&token), &clock, limits()).await.unwrap();
    until("connected", || b.peers().iter().any(|(node, ..)| *node == a.id())).await;
    assert_eq!(a.count("certificates_granted"), 1);
}

/// Joins by hand with that token and gives the frames that it sent; `replay` sends those instead.
async fn join_by_hand(
    raw: &Raw,
    a: &TestNode,
    token: &str,
    replay: &[Frame],
) -> (Vec<Frame>, bool) {
    let (start, wall) = (Instant::ORIGIN, UnixTime(START));
    let connection = raw.dial(a.mesh.address()).await;
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let purpose = Purpose::Invite(token.parse::<Invite>().unwrap());
    let at = (a.id(), binding(&connection));
    let (mut joiner, hello) = Joiner::new(start, purpose, raw.key.clone(), at, [9; 32]);
    let mut replay = replay.iter();
    let hello = replay.next().cloned().unwrap_or(hello);
    send.write_all(&hello.encode()).await.unwrap();
    let (mut sent, mut granted) = (vec![hello], false);
    while let Some(frame) = next_frame(&mut receive).await {
        granted |= frame.kind == Kind::JOIN_GRANT;
        let mut out = Vec::new();
        joiner.handle(start, JoinerInput::Frame { frame, wall }, &mut out);
        for output in out {
            if let JoinerOutput::Send(frame) = output {
                let frame = replay.next().cloned().unwrap_or(frame);
                send.write_all(&frame.encode()).await.unwrap();
                sent.push(frame);
            }
        }
    }
    (sent, granted)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_said_once_is_worth_nothing_again() {
    let clock = TestClock::new();
    let a = TestNode::start(None, &clock).await;
    let token = a.token(5);
    let raw = Raw::new(78);
    let (said, granted) = join_by_hand(&raw, &a, &token, &[]).await;
    assert!(granted && said.len() == 2, "{} frames", said.len());
    until("counted", || a.count("certificates_granted") == 1).await;
    // The same words on another connection, from the same key and from another, although the token has
    // uses left: they were signed for the first connection only.
    for raw in [&raw, &Raw::new(79)] {
        let refused = a.count("joins_refused");
        let (_, granted) = join_by_hand(raw, &a, &token, &said).await;
        assert!(!granted);
        until("refused", || a.count("joins_refused") == refused + 1).await;
    }
    assert_eq!(a.count("certificates_granted"), 1);
    // Whoever has the token itself can use it.
    assert!(join_by_hand(&Raw::new(80), &a, &token, &[]).await.1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_certificate_of_another_opens_nothing() {
    let clock = TestClock::new();
    let a = TestNode::start(None, &clock).await;
    let b = TestNode::start(Some(&a.token(1)), &clock).await;
    b.connected(&a).await;
    let standing = b.mesh.standing().unwrap();
    let trust = protocol::identity::Trust::clone(&standing.trust);
    let thief = Raw::new(81);
    let connection = thief.dial(a.mesh.address()).await;
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let (_, hello) = Greeting::new(Instant::ORIGIN, trust, standing.certificate, a.id());
    let before = a.count("members_refused");
    send.write_all(&hello.encode()).await.unwrap();
    let mut welcomed = false;
    while let Some(frame) = next_frame(&mut receive).await {
        welcomed |= frame.kind == Kind::PEER_WELCOME;
    }
    assert!(!welcomed);
    let closed = tokio::time::timeout(Duration::from_secs(10), connection.closed()).await;
    let why = closed.expect("the node lets go").to_string();
    assert!(why.contains(&b.id().short()), "it names whose certificate that is: {why}");
    until("counted", || a.count("members_refused") == before + 1).await;
    // Datagrams and calls never began, and the owner of the certificate is still served.
    assert!(a.heard.datagrams.lock().unwrap().is_empty());
    assert!(b.reaches(&a).await);
}
