//! Join tokens.
//!
//! A token is a key pair of its own with a record of what it is good for, signed by the authority that
//! made it. Who holds the secret half proves it with a signature over the exchange, so that the secret
//! never travels; any authority can check the record, so that none has to keep secrets of tokens.

use core::net::SocketAddr;
use std::fmt;

use bincode::{Decode, Encode};
use data_encoding::BASE32_NOPAD_NOCASE;

use crate::wire;
use crate::{MeshId, NodeId};

use super::authority::SetHash;
use super::certificate::Roles;
use super::key::NodeKey;
use super::signed::{Signed, Statement};
use super::trust::Trust;
use super::unix_time::UnixTime;

/// A token's public half, which names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct InviteId(pub [u8; 32]);

impl InviteId {
    /// Eight characters that people can compare.
    pub fn short(&self) -> String {
        NodeId(self.0).short()
    }
}

impl fmt::Display for InviteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        NodeId(self.0).fmt(f)
    }
}

impl fmt::Debug for InviteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InviteId({})", self.short())
    }
}

/// What a token is good for. Public: it is of no use without the secret.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct InviteRecord {
    pub mesh: MeshId,
    pub id: InviteId,
    /// Roles of those who join with it.
    pub roles: Roles,
    /// How many nodes may join with it, 1 to [`INVITE_USES_MAX`].
    pub uses: u16,
    pub expires: UnixTime,
    /// The authority epoch in which it was made; a joiner believes no older authority.
    pub epoch: u64,
    /// The authority set of that epoch.
    pub head: SetHash,
}

impl Statement for InviteRecord {
    const DOMAIN: &'static str = "grapevine invite 1";
}

/// A record with the authority that made it.
pub type SignedRecord = Signed<InviteRecord>;

impl SignedRecord {
    /// The authority that counts the uses of this token: its issuer for as long as that is one, then
    /// the present authority with the highest hash of itself and the token (rendezvous hashing,
    /// Thaler and Ravishankar 1998). So everybody names the same one, and it is one.
    pub fn home(&self, trust: &Trust) -> NodeId {
        if trust.is_authority(self.signer) {
            return self.signer;
        }
        let weight = |node: &NodeId| {
            let mut hasher = blake3::Hasher::new_derive_key("grapevine invite home 1");
            hasher.update(&self.body.id.0);
            hasher.update(&node.0);
            *hasher.finalize().as_bytes()
        };
        let members = trust.authorities();
        *members.iter().max_by_key(|n| weight(n)).expect("a set has a member")
    }

    /// Whether this node's mesh made this token, and it may still be used at `now`. Counting its uses is
    /// [`super::Ledger`]'s part.
    pub fn check(&self, trust: &Trust, now: UnixTime) -> Result<(), InviteError> {
        let record = &self.body;
        if record.mesh != trust.mesh() {
            return Err(InviteError::OtherMesh { theirs: record.mesh });
        }
        if now > record.expires {
            return Err(InviteError::Expired { at: record.expires });
        }
        let issuer = self.signer;
        if trust.revocations().is_revoked(issuer) {
            return Err(InviteError::IssuerRevoked { issuer });
        }
        // The issuer must have had authority in that epoch, or have it now.
        let was = trust.chain().at(record.epoch).is_some_and(|s| s.body.members.contains(&issuer));
        if !was && !trust.is_authority(issuer) {
            return Err(InviteError::NoAuthority { issuer });
        }
        if record.uses == 0 || record.uses > INVITE_USES_MAX {
            return Err(InviteError::Uses { uses: record.uses });
        }
        self.verify().map_err(|_| InviteError::Forged)?;
        Ok(())
    }
}

/// A join token: what a person passes on.
#[derive(Clone)]
pub struct Invite {
    pub record: SignedRecord,
    secret: NodeKey,
    /// Addresses of nodes to begin with.
    pub seeds: Vec<SocketAddr>,
}

impl Invite {
    /// Makes a token. `secret` is 32 random bytes; `key` is an authority of `trust`.
    ///
    /// # Errors
    /// If it could not work: no uses, no seeds, too many of either, already expired, or no authority.
    pub fn new(
        trust: &Trust,
        key: &NodeKey,
        secret: [u8; 32],
        grant: (Roles, u16, UnixTime),
        seeds: Vec<SocketAddr>,
        now: UnixTime,
    ) -> Result<Invite, InviteError> {
        let (roles, uses, expires) = grant;
        if !trust.is_authority(key.id()) {
            return Err(InviteError::NoAuthority { issuer: key.id() });
        }
        if seeds.is_empty() || seeds.len() > INVITE_SEEDS_MAX {
            return Err(InviteError::Seeds { seeds: seeds.len() });
        }
        let secret = NodeKey::from_secret(secret);
        let record = InviteRecord {
            mesh: trust.mesh(),
            id: InviteId(secret.id().0),
            roles,
            uses,
            expires,
            epoch: trust.epoch(),
            head: trust.head(),
        };
        let record = Signed::new(record, key);
        record.check(trust, now)?;
        Ok(Invite { record, secret, seeds })
    }

    pub fn id(&self) -> InviteId {
        self.record.body.id
    }

    pub fn mesh(&self) -> MeshId {
        self.record.body.mesh
    }

    /// The secret half, with which the joiner signs the exchange.
    pub(super) fn key(&self) -> &NodeKey {
        &self.secret
    }
}

impl fmt::Debug for Invite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invite").field("id", &self.id()).finish_non_exhaustive()
    }
}

/// What the text of a token holds. The id follows from the secret and is left out.
#[derive(Encode, Decode)]
struct InviteWire {
    mesh: MeshId,
    secret: [u8; 32],
    roles: Roles,
    uses: u16,
    expires: UnixTime,
    epoch: u64,
    head: SetHash,
    issuer: NodeId,
    signature: super::key::Signature,
    seeds: Vec<SocketAddr>,
}

impl fmt::Display for Invite {
    /// `vine1-` and lower-case base32 of the wire form and a checksum: one word, safe in shells and URLs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let record = &self.record.body;
        let mut bytes = wire::encode(&InviteWire {
            mesh: record.mesh,
            secret: self.secret.secret(),
            roles: record.roles,
            uses: record.uses,
            expires: record.expires,
            epoch: record.epoch,
            head: record.head,
            issuer: self.record.signer,
            signature: self.record.signature,
            seeds: self.seeds.clone(),
        });
        bytes.extend_from_slice(&checksum(&bytes));
        write!(f, "{PREFIX}{}", BASE32_NOPAD_NOCASE.encode(&bytes).to_ascii_lowercase())
    }
}

impl std::str::FromStr for Invite {
    type Err = InviteError;

    /// Reads a token. Spaces and line breaks inside, as terminals and mails add them, are ignored.
    fn from_str(text: &str) -> Result<Invite, InviteError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(InviteError::NotAToken);
        }
        let text: String = text.split_whitespace().collect();
        let Some(body) = text.strip_prefix(PREFIX) else {
            return Err(match text.starts_with("vine") && text.contains('-') {
                true => InviteError::OtherVersion,
                false => InviteError::NotAToken,
            });
        };
        let bytes =
            BASE32_NOPAD_NOCASE.decode(body.as_bytes()).map_err(|_| InviteError::Mistyped)?;
        let (bytes, sum) = bytes.split_last_chunk::<4>().ok_or(InviteError::Mistyped)?;
        if checksum(bytes) != *sum {
            return Err(InviteError::Mistyped);
        }
        Invite::from_wire(bytes)
    }
}

impl Invite {
    /// Reads what the text of a token holds before its checksum. Of use to fuzzers; tokens are read from
    /// their text.
    ///
    /// # Errors
    /// If the bytes are no token, or its record is not signed by who it says.
    pub fn from_wire(bytes: &[u8]) -> Result<Invite, InviteError> {
        let wire: InviteWire =
            wire::decode::<_, WIRE_BYTES_MAX>(bytes).map_err(|_| InviteError::NotAToken)?;
        if wire.seeds.is_empty() || wire.seeds.len() > INVITE_SEEDS_MAX {
            return Err(InviteError::Seeds { seeds: wire.seeds.len() });
        }
        let secret = NodeKey::from_secret(wire.secret);
        let body = InviteRecord {
            mesh: wire.mesh,
            id: InviteId(secret.id().0),
            roles: wire.roles,
            uses: wire.uses,
            expires: wire.expires,
            epoch: wire.epoch,
            head: wire.head,
        };
        let record = Signed { body, signer: wire.issuer, signature: wire.signature };
        record.verify().map_err(|_| InviteError::Forged)?;
        Ok(Invite { record, secret, seeds: wire.seeds })
    }
}

/// Tells a typing error from a wrong token; no protection against anybody.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    let hash = blake3::derive_key("grapevine invite checksum 1", bytes);
    [hash[0], hash[1], hash[2], hash[3]]
}

/// Why a token is refused. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InviteError {
    #[error("this is no token: one begins with {PREFIX} and comes from `vine invite`")]
    NotAToken,
    #[error("this token was made by another version of Grapevine, which this one does not know")]
    OtherVersion,
    #[error("the token is mistyped or cut off: copy it whole")]
    Mistyped,
    #[error("the token is forged or damaged: its signature does not fit")]
    Forged,
    #[error("the token is for mesh {}, another one", theirs.short())]
    OtherMesh { theirs: MeshId },
    #[error("the token expired at {at}: make a new one with `vine invite`")]
    Expired { at: UnixTime },
    #[error(
        "the token was made by {}, which is revoked: make a new one on another authority",
        issuer.short()
    )]
    IssuerRevoked { issuer: NodeId },
    #[error(
        "{} is no authority of this mesh: `vine authority` lists those that can make tokens",
        issuer.short()
    )]
    NoAuthority { issuer: NodeId },
    #[error("a token for {uses} nodes: 1 to {INVITE_USES_MAX} are allowed")]
    Uses { uses: u16 },
    #[error("a token with {seeds} addresses: 1 to {INVITE_SEEDS_MAX} are allowed")]
    Seeds { seeds: usize },
}

/// Begins every token of this version.
const PREFIX: &str = "vine1-";

/// Most nodes that one token lets in.
pub const INVITE_USES_MAX: u16 = 256;

/// Most addresses in a token.
pub const INVITE_SEEDS_MAX: usize = 4;

/// The text of the longest token is about 470 bytes; the rest is for spaces.
const TEXT_BYTES_MAX: usize = 2048;
const WIRE_BYTES_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::super::testing::{NOW, key, trust};
    use super::*;
    use proptest::prelude::*;

    fn seeds() -> Vec<SocketAddr> {
        vec!["192.0.2.7:8421".parse().unwrap(), "[2001:db8::1]:8421".parse().unwrap()]
    }

    fn invite() -> Invite {
        let grant = (Roles::ALL, 1, NOW.plus(3600));
        Invite::new(&trust(&[1, 2]), &key(1), [42; 32], grant, seeds(), NOW).unwrap()
    }

    #[test]
    fn golden() {
        let text = invite().to_string();
        let golden = [
            "vine1-khytmww5sb6d3sxk3d5osdh6kwicmobeqn33jxi5wua3cfkuvrdcukrkfivcukrkfivc",
            "ukrkfivcukrkfivcukrkfivcukrkfivcukqhah6bbycjnmbbcwjotcuidtmpmhfz274vdw3wdz",
            "o2fiatu3rw3p4fqyn434agkhekrdr525aj6gk72uw3fu6luxlszjtqtpy5sqjbx43uraa3id3p",
            "lspa5p6ugt5qvxddkp6kzmggtuuy7byfnqsyui42oi2bftrsrc6a3cnzuo2qsiunv7t5ialxe5",
            "jini7pueszcviaqt5tg22igynkhzikaiamaaaca756kiabeaaq3oaaaaaaaaaaaaaaaaaaah56",
            "kibpmgfp6",
        ];
        assert_eq!(text, golden.concat());
        let read: Invite = text.parse().unwrap();
        assert_eq!((read.record, read.seeds), (invite().record, seeds()));
        assert_eq!(read.secret.secret(), [42; 32]);
        assert_eq!(format!("{:?}", invite()), format!("Invite {{ id: {:?}, .. }}", invite().id()));
    }

    #[test]
    fn typing_errors_are_told_from_wrong_tokens() {
        let text = invite().to_string();
        let error = |text: &str| text.parse::<Invite>().err();
        assert_eq!(error(&text.to_uppercase().replacen("VINE1", "vine1", 1)), None);
        assert_eq!(error(&format!(" {}\n  {} ", &text[..40], &text[40..])), None);
        for (bad, why) in [
            ("", InviteError::NotAToken),
            ("hello", InviteError::NotAToken),
            ("vine2-abcd", InviteError::OtherVersion),
            ("vine1-", InviteError::Mistyped),
            (&text[..text.len() - 1], InviteError::Mistyped),
            (&"x".repeat(TEXT_BYTES_MAX + 1), InviteError::NotAToken),
        ] {
            assert_eq!(error(bad), Some(why), "{bad:?}");
        }
        // Every single wrong letter, and every pair of neighbours swapped.
        let bytes = text.as_bytes();
        for at in PREFIX.len()..bytes.len() {
            for letter in [b'a', b'7', b'1', b'!'] {
                let mut changed = bytes.to_vec();
                changed[at] = letter;
                if changed != bytes {
                    let changed = String::from_utf8(changed).unwrap();
                    assert_eq!(error(&changed), Some(InviteError::Mistyped), "{at}");
                }
            }
            let mut swapped = bytes.to_vec();
            swapped.swap(at, (at + 1).min(bytes.len() - 1));
            if swapped != bytes {
                assert_eq!(
                    error(&String::from_utf8(swapped).unwrap()),
                    Some(InviteError::Mistyped)
                );
            }
        }
    }

    #[test]
    fn records_are_checked() {
        type Change = fn(&mut SignedRecord);
        let mut trust = trust(&[1, 2]);
        let theirs = key(8).root().mesh();
        let issuer = key(6).id();
        let cases: [(Change, InviteError); 6] = [
            (|r| r.body.mesh = key(8).root().mesh(), InviteError::OtherMesh { theirs }),
            (|r| r.body.expires.0 += 1, InviteError::Forged),
            (|r| r.body.roles = Roles::new(&[]), InviteError::Forged),
            (|r| r.body.uses = 2, InviteError::Forged),
            (|r| r.body.uses = 0, InviteError::Uses { uses: 0 }),
            (|r| r.signer = key(6).id(), InviteError::NoAuthority { issuer }),
        ];
        for (change, error) in cases {
            let mut record = invite().record;
            assert_eq!(record.check(&trust, NOW), Ok(()));
            change(&mut record);
            assert_eq!(record.check(&trust, NOW), Err(error));
        }
        let record = invite().record;
        let at = NOW.plus(3600);
        assert_eq!(record.check(&trust, at.plus(1)), Err(InviteError::Expired { at }));
        trust.revoke(&key(2), key(1).id(), true, NOW).unwrap();
        let issuer = key(1).id();
        assert_eq!(record.check(&trust, NOW), Err(InviteError::IssuerRevoked { issuer }));
    }

    /// A token outlives its issuer: the others agree on one that counts it from then on.
    #[test]
    fn the_home_of_a_token() {
        let mut trust = trust(&[1, 2, 3]);
        let grant = (Roles::ALL, 1, NOW.plus(3600));
        let mut homes = std::collections::BTreeSet::new();
        let invites: Vec<_> = (50..90)
            .map(|n| Invite::new(&trust, &key(1), [n; 32], grant, seeds(), NOW).unwrap().record)
            .collect();
        for record in &invites {
            assert_eq!(record.home(&trust), key(1).id());
        }
        trust.change_authorities(&key(2), vec![key(2).id(), key(3).id()], NOW).unwrap();
        for record in &invites {
            assert_eq!(record.check(&trust, NOW), Ok(()));
            homes.insert(record.home(&trust));
        }
        assert_eq!(homes, [key(2).id(), key(3).id()].into());
    }

    proptest! {
        #[test]
        fn round_trip(
            secret: [u8; 32],
            uses in 1..=INVITE_USES_MAX,
            ttl in 0u64..1 << 40,
            seeds in prop::collection::vec(any::<(core::net::Ipv6Addr, u16)>(), 1..=INVITE_SEEDS_MAX),
        ) {
            let seeds: Vec<SocketAddr> = seeds.into_iter().map(SocketAddr::from).collect();
            let grant = (Roles::ALL, uses, NOW.plus(ttl));
            let made = Invite::new(&trust(&[1]), &key(1), secret, grant, seeds, NOW).unwrap();
            let read: Invite = made.to_string().parse().unwrap();
            prop_assert_eq!(&read.record, &made.record);
            prop_assert_eq!(&read.seeds, &made.seeds);
            prop_assert!(made.to_string().len() < 600);
        }

        #[test]
        fn any_text(text: String) {
            let _ = text.parse::<Invite>();
            let _ = format!("vine1-{text}").parse::<Invite>();
        }
    }
}
