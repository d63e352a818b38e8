//! Both sides of the exchange against each other, and against somebody in between.

use std::sync::Arc;

use super::super::certificate::{LIFETIME_S, RENEWAL_GRACE_S, Roles};
use super::super::invite::Invite;
use super::super::testing::{NOW, hex, key, mutations, trust};
use super::super::{Certificate, Trust, UnixTime};
use super::*;
use crate::frame::{Frame, Kind};
use crate::{Instant, Machine, wire};

const START: Instant = Instant::ORIGIN;
const TLS: ChannelBinding = ChannelBinding([77; 32]);

fn certificate(trust: &Trust, node: u8) -> Certificate {
    trust.issue(&key(1), key(node).id(), Roles::ALL, 7, NOW).unwrap()
}

fn invite(trust: &Trust, issuer: u8) -> Invite {
    let grant = (Roles::ALL, 1, NOW.plus(3600));
    let seeds = vec!["192.0.2.7:8421".parse().unwrap()];
    Invite::new(trust, &key(issuer), [42; 32], grant, seeds, NOW).unwrap()
}

fn contact(node: u8) -> Contact {
    Contact { node: key(node).id(), addresses: vec!["192.0.2.1:8421".parse().unwrap()] }
}

/// Node 5 that asks node `peer`.
fn joiner(purpose: Purpose, peer: u8) -> (Joiner, Frame) {
    Joiner::new(START, purpose, key(5), (key(peer).id(), TLS), [1; 32])
}

/// Node `me` that is asked by node 5.
fn issuer(trust: &Trust, me: u8, binding: ChannelBinding) -> Issuer {
    let place = IssuerPlace {
        key: key(me),
        trust: Arc::new(trust.clone()),
        certificate: certificate(trust, me),
        contacts: vec![contact(1), contact(2), contact(3)],
        nonce: [2; 32],
        serial: 99,
    };
    Issuer::new(START, place, (key(5).id(), binding))
}

/// One exchange: who ends how, and every frame that travelled.
struct Run {
    joiner: String,
    issuer: String,
    frames: Vec<(Kind, Vec<u8>)>,
    joined: Option<Box<Joined>>,
}

fn run(
    (mut joiner, hello): (Joiner, Frame),
    mut issuer: Issuer,
    wall: UnixTime,
    mut redeem: impl FnMut() -> Result<(), Refusal>,
) -> Run {
    let mut run =
        Run { joiner: String::new(), issuer: String::new(), frames: vec![], joined: None };
    let (mut to_issuer, mut to_joiner) = (vec![IssuerInput::Frame { frame: hello, wall }], vec![]);
    while !to_issuer.is_empty() || !to_joiner.is_empty() {
        let mut out = vec![];
        for input in std::mem::take(&mut to_issuer) {
            if let IssuerInput::Frame { frame, .. } = &input {
                run.frames.push((frame.kind, frame.body.clone()));
            }
            issuer.handle(START, input, &mut out);
        }
        for output in out {
            match output {
                IssuerOutput::Send(frame) => to_joiner.push(frame),
                IssuerOutput::Redeem(_) => {
                    to_issuer.push(IssuerInput::Redeemed { result: redeem(), wall });
                }
                IssuerOutput::Granted(_) => run.issuer.push_str("granted"),
                IssuerOutput::Redirected => run.issuer.push_str("redirected"),
                IssuerOutput::Failed(error) => run.issuer.push_str(&error.to_string()),
            }
        }
        let mut out = vec![];
        for frame in std::mem::take(&mut to_joiner) {
            run.frames.push((frame.kind, frame.body.clone()));
            joiner.handle(START, JoinerInput::Frame { frame, wall }, &mut out);
        }
        for output in out {
            match output {
                JoinerOutput::Send(frame) => to_issuer.push(IssuerInput::Frame { frame, wall }),
                JoinerOutput::Joined(joined) => {
                    run.joiner.push_str("joined");
                    run.joined = Some(joined);
                }
                JoinerOutput::Elsewhere(at) => {
                    let nodes: Vec<_> = at.iter().map(|c| c.node.short()).collect();
                    run.joiner.push_str(&format!("elsewhere {}", nodes.join(" ")));
                }
                JoinerOutput::Failed(error) => run.joiner.push_str(&error.to_string()),
            }
        }
    }
    run
}

fn by_token(trust: &Trust, token: &Invite, peer: u8, wall: UnixTime) -> Run {
    let joiner = joiner(Purpose::Invite(token.clone()), peer);
    run(joiner, issuer(trust, peer, TLS), wall, || Ok(()))
}

#[test]
fn a_token_becomes_a_certificate() {
    let trust = trust(&[1, 2]);
    let run = by_token(&trust, &invite(&trust, 1), 1, NOW);
    assert_eq!((run.joiner.as_str(), run.issuer.as_str()), ("joined", "granted"));
    let joined = run.joined.unwrap();
    assert_eq!(trust.check(&joined.certificate, key(5).id(), NOW), Ok(()));
    assert_eq!((joined.trust, joined.peers.len()), (trust, 3));
    // The bytes of every frame. A change of any is a new version of the protocol.
    let golden: Vec<String> = run
        .frames
        .iter()
        .map(|(kind, body)| {
            let hash = blake3::hash(body).to_hex();
            format!("{} {} {}", kind.0, body.len(), &hash.as_str()[..16])
        })
        .collect();
    assert_eq!(
        golden,
        [
            "1 32 9515049071ed9131",
            "2 743 b3b348c50e62baf0",
            "3 329 60359142f91c9951",
            "4 297 eaa51a0e044707b5",
        ],
        "{:?}",
        run.frames.iter().map(|(_, body)| hex(body)).collect::<Vec<_>>()
    );
    // The secret of the token is in none of them.
    let secret = [42; 32];
    assert!(run.frames.iter().all(|(_, body)| !body.windows(32).any(|w| w == secret)));
}

#[test]
fn each_way_to_be_refused() {
    let honest = trust(&[1, 2]);
    let token = invite(&honest, 1);
    let other = Trust::found(&key(8), key(1).id(), NOW);
    let mut revoked = honest.clone();
    revoked.revoke(&key(1), key(5).id(), true, NOW).unwrap();
    let mut newer = honest.clone();
    newer.change_authorities(&key(1), vec![key(1).id(), key(2).id(), key(3).id()], NOW).unwrap();
    let ask = |trust: &Trust, token: &Invite, wall, redeem: Result<(), Refusal>| {
        let joiner = joiner(Purpose::Invite(token.clone()), 1);
        let run = run(joiner, issuer(trust, 1, TLS), wall, || redeem.clone());
        (run.joiner, run.issuer)
    };
    let late = NOW.plus(3601);
    for (trust, token, wall, redeemed, joiner, issuer) in [
        (
            &honest,
            &token,
            late,
            Ok(()),
            "refused: the token expired at 2027-01-15 09:00:00 UTC: make a new one with `vine invite`",
            "the token expired at 2027-01-15 09:00:00 UTC: make a new one with `vine invite`",
        ),
        (
            &honest,
            &token,
            NOW,
            Err(Refusal::TokenUsed { uses: 1 }),
            "refused: the token has been used (it was for 1): make a new one with `vine invite`",
            "the token has been used (it was for 1): make a new one with `vine invite`",
        ),
        // Nothing is told to another mesh: its side waits for a claim that never comes.
        (
            &other,
            &token,
            NOW,
            Ok(()),
            "the node that answered belongs to mesh kgias4lm, not to khytmww5",
            "",
        ),
        (
            &revoked,
            &token,
            NOW,
            Ok(()),
            "refused: this node has been revoked: an authority can take that back",
            "node nz5bzxjj is revoked",
        ),
        (
            &honest,
            &invite(&newer, 1),
            NOW,
            Ok(()),
            "the node that answered knows the mesh's authorities of epoch 2 only, the token is of \
             epoch 3: ask another node, or later",
            "",
        ),
        (&newer, &token, NOW, Ok(()), "joined", "granted"),
    ] {
        assert_eq!(ask(trust, token, wall, redeemed), (joiner.to_owned(), issuer.to_owned()));
    }
}

#[test]
fn a_wrong_secret() {
    let trust = trust(&[1]);
    let right = invite(&trust, 1);
    let grant = (Roles::ALL, 1, NOW.plus(3600));
    let mut wrong =
        Invite::new(&trust, &key(1), [43; 32], grant, right.seeds.clone(), NOW).unwrap();
    wrong.record = right.record;
    let run = by_token(&trust, &wrong, 1, NOW);
    assert_eq!(run.joiner, "refused: the token's secret is wrong");
    assert_eq!(
        run.issuer,
        "the token's secret is wrong, or the token was shown on another connection"
    );
}

/// Somebody with two TLS connections passes every frame on. Its two connections have two exporters.
#[test]
fn a_man_in_the_middle_gets_nothing() {
    let trust = trust(&[1]);
    let token = invite(&trust, 1);
    // It shows its own key to the joiner, who notices before it has told anything...
    let relayed = run(
        joiner(Purpose::Invite(token.clone()), 6),
        issuer(&trust, 1, ChannelBinding([78; 32])),
        NOW,
        || Ok(()),
    );
    assert_eq!(relayed.joiner, JoinError::Intercepted.to_string());
    assert!(!relayed.frames.iter().any(|(kind, _)| *kind == Kind::JOIN_CLAIM));
    // ... and so it does if somebody had the authority's key but not the connection.
    let relayed = run(
        joiner(Purpose::Invite(token.clone()), 1),
        issuer(&trust, 1, ChannelBinding([78; 32])),
        NOW,
        || Ok(()),
    );
    assert_eq!(relayed.joiner, JoinError::Intercepted.to_string());
    // A claim recorded on one connection is worth nothing on another.
    let recorded = by_token(&trust, &token, 1, NOW);
    let (_, claim) = recorded.frames.iter().find(|(k, _)| *k == Kind::JOIN_CLAIM).unwrap();
    for (binding, nonce) in [(ChannelBinding([78; 32]), [2; 32]), (TLS, [3; 32])] {
        let mut replayed = issuer(&trust, 1, binding);
        replayed.place.nonce = nonce;
        let hello = Frame::new(Kind::JOIN_HELLO, &JoinHello { nonce: [1; 32] });
        let mut out = vec![];
        replayed.handle(START, IssuerInput::Frame { frame: hello, wall: NOW }, &mut out);
        let frame = Frame { kind: Kind::JOIN_CLAIM, body: claim.clone() };
        replayed.handle(START, IssuerInput::Frame { frame, wall: NOW }, &mut out);
        assert!(matches!(out.last(), Some(IssuerOutput::Failed(IssuerError::Forged))), "{out:?}");
    }
}

/// A node of the mesh that stole a token's record, but not its secret, signs the claim itself.
#[test]
fn a_record_alone_is_worth_nothing() {
    let trust = trust(&[1]);
    let token = invite(&trust, 1);
    let recorded = by_token(&trust, &token, 1, NOW);
    let (_, body) = recorded.frames.iter().find(|(k, _)| *k == Kind::JOIN_CLAIM).unwrap();
    let claim: JoinClaim = wire::decode::<_, JOIN_FRAME_BYTES_MAX>(body).unwrap();
    // Node 6 on a connection of its own shows node 5's claim, signed by itself.
    let mut asked = issuer(&trust, 1, TLS);
    asked.peer = key(6).id();
    let transcript =
        Transcript::new(TLS, (key(6).id(), [1; 32]), (key(1).id(), [2; 32]), trust.mesh());
    let signature = transcript.sign(Signer::Joiner, &wire::encode(&claim.claim), &key(6));
    let mut out = vec![];
    for frame in [
        Frame::new(Kind::JOIN_HELLO, &JoinHello { nonce: [1; 32] }),
        Frame::new(Kind::JOIN_CLAIM, &JoinClaim { claim: claim.claim, signature }),
    ] {
        asked.handle(START, IssuerInput::Frame { frame, wall: NOW }, &mut out);
    }
    assert!(matches!(out.last(), Some(IssuerOutput::Failed(IssuerError::Secret))), "{out:?}");
}

#[test]
fn who_is_not_the_home_names_it() {
    let mut trust = trust(&[1, 2]);
    let token = invite(&trust, 1);
    let run = by_token(&trust, &token, 2, NOW);
    assert_eq!(run.joiner, format!("elsewhere {}", key(1).id().short()));
    assert_eq!(run.issuer, "redirected");
    // A plain member names it, too.
    assert_eq!(by_token(&trust, &token, 3, NOW).issuer, "redirected");
    // The issuer is gone: another authority counts the token from now on.
    trust.change_authorities(&key(2), vec![key(2).id()], NOW).unwrap();
    let place = IssuerPlace {
        key: key(2),
        certificate: trust.issue(&key(2), key(2).id(), Roles::ALL, 1, NOW).unwrap(),
        trust: Arc::new(trust.clone()),
        contacts: vec![],
        nonce: [2; 32],
        serial: 1,
    };
    let asked = Issuer::new(START, place, (key(5).id(), TLS));
    let granted = super::tests::run(joiner(Purpose::Invite(token), 2), asked, NOW, || Ok(()));
    assert_eq!((granted.joiner.as_str(), granted.issuer.as_str()), ("joined", "granted"));
}

#[test]
fn renewal() {
    let mut trust = trust(&[1, 2]);
    let old = certificate(&trust, 5);
    let end = NOW.plus(LIFETIME_S);
    let renew = |mine: &Trust, theirs: &Trust, peer: u8, wall: UnixTime| {
        let purpose = Purpose::Renewal { trust: mine.clone(), certificate: old.clone() };
        let place = IssuerPlace {
            key: key(peer),
            certificate: theirs.issue(&key(1), key(peer).id(), Roles::ALL, 1, wall).unwrap(),
            trust: Arc::new(theirs.clone()),
            contacts: vec![contact(1), contact(2)],
            nonce: [2; 32],
            serial: 1,
        };
        let asked = Issuer::new(START, place, (key(5).id(), TLS));
        let redeem = || unreachable!("a renewal uses no token");
        super::tests::run(joiner(purpose, peer), asked, wall, redeem)
    };
    let before = trust.clone();
    let members = vec![key(1).id(), key(2).id(), key(3).id()];
    trust.change_authorities(&key(1), members, NOW).unwrap();
    for (wall, result) in [
        (NOW, "joined"),
        (end.plus(7 * 86_400), "joined"),
        (
            end.plus(RENEWAL_GRACE_S + 1),
            "refused: the certificate expired 2592001 s ago: join again with a token",
        ),
    ] {
        let run = renew(&before, &trust, 2, wall);
        assert_eq!(run.joiner, result);
        if let Some(joined) = run.joined {
            assert_eq!(joined.trust, trust, "it learns the newer authorities");
            assert_eq!(joined.certificate.body.roles, old.body.roles);
        }
    }
    // A plain member sends it to the authorities.
    let run = renew(&trust, &trust, 4, NOW);
    let expected = format!("elsewhere {} {}", key(1).id().short(), key(2).id().short());
    assert_eq!(run.joiner, expected);
}

#[test]
fn every_wait_ends() {
    let trust = trust(&[1]);
    let late = START + JOIN_WAIT;
    let (mut waiting, _) = joiner(Purpose::Invite(invite(&trust, 1)), 1);
    let mut out = vec![];
    assert_eq!(waiting.next_deadline(), Some(late));
    waiting.handle(START, JoinerInput::Timer, &mut out);
    assert!(out.is_empty());
    waiting.handle(late, JoinerInput::Timer, &mut out);
    let expected = "waited 10 s in vain for its proof of belonging to the mesh";
    assert!(matches!(&out[..], [JoinerOutput::Failed(e)] if e.to_string() == expected));
    assert_eq!(waiting.next_deadline(), None);

    let mut asked = issuer(&trust, 1, TLS);
    let mut out = vec![];
    let hello = Frame::new(Kind::JOIN_HELLO, &JoinHello { nonce: [1; 32] });
    asked.handle(late, IssuerInput::Frame { frame: hello.clone(), wall: NOW }, &mut out);
    assert_eq!(asked.next_deadline(), Some(late + JOIN_WAIT));
    asked.handle(late + JOIN_WAIT, IssuerInput::Timer, &mut out);
    assert!(matches!(out.last(), Some(IssuerOutput::Failed(IssuerError::Timeout { .. }))));
    // What is over stays over.
    let before = out.len();
    asked.handle(late, IssuerInput::Frame { frame: hello, wall: NOW }, &mut out);
    asked.handle(late, IssuerInput::Closed, &mut out);
    assert_eq!((out.len(), asked.next_deadline()), (before, None));
}

/// No changed frame makes a node join or be let in; none panics, none allocates beyond its bound.
#[test]
fn mutations_of_every_frame() {
    let trust = trust(&[1]);
    let token = invite(&trust, 1);
    let good = by_token(&trust, &token, 1, NOW);
    let hello = Frame { kind: Kind::JOIN_HELLO, body: good.frames[0].1.clone() };
    for body in mutations(&good.frames[1].1) {
        let (mut machine, _) = joiner(Purpose::Invite(token.clone()), 1);
        let mut out = vec![];
        let frame = Frame { kind: Kind::JOIN_PROOF, body };
        machine.handle(START, JoinerInput::Frame { frame, wall: NOW }, &mut out);
        assert!(matches!(&out[..], [JoinerOutput::Failed(_)]), "{out:?}");
    }
    for body in mutations(&good.frames[2].1) {
        let mut machine = issuer(&trust, 1, TLS);
        let mut out = vec![];
        for frame in [hello.clone(), Frame { kind: Kind::JOIN_CLAIM, body }] {
            machine.handle(START, IssuerInput::Frame { frame, wall: NOW }, &mut out);
        }
        assert!(matches!(out.last(), Some(IssuerOutput::Failed(_))), "{out:?}");
    }
    // A grant is protected by TLS; changed, it still is no certificate of this mesh.
    let certificate_bytes = wire::encode(&certificate(&trust, 5)).len();
    let proof = Frame { kind: Kind::JOIN_PROOF, body: good.frames[1].1.clone() };
    for body in mutations(&good.frames[3].1) {
        let body_shown = body.clone();
        let changed = body.get(..certificate_bytes) != good.frames[3].1.get(..certificate_bytes);
        let (mut machine, _) = joiner(Purpose::Invite(token.clone()), 1);
        let mut out = vec![];
        for frame in [proof.clone(), Frame { kind: Kind::JOIN_GRANT, body }] {
            machine.handle(START, JoinerInput::Frame { frame, wall: NOW }, &mut out);
        }
        let joined = out.iter().any(|o| matches!(o, JoinerOutput::Joined(_)));
        assert!(!(changed && joined), "{}", hex(&body_shown));
    }
    // Every other kind, in every state.
    for kind in (0..64).map(Kind) {
        let mut machine = issuer(&trust, 1, TLS);
        let mut out = vec![];
        for frame in [Frame { kind, body: hello.body.clone() }, hello.clone()] {
            machine.handle(START, IssuerInput::Frame { frame, wall: NOW }, &mut out);
        }
        let over = matches!(out.last(), Some(IssuerOutput::Failed(_)));
        assert!(over, "{kind:?}: {out:?}");
    }
}
