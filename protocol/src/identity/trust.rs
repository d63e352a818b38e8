//! What one node knows about who belongs to its mesh.

use crate::{MeshId, NodeId};

use super::authority::{AuthorityChain, AuthorityError, SetHash, SignedSet};
use super::certificate::{
    BACKDATE_S, Certificate, CertificateError, LIFETIME_S, Membership, RENEWAL_GRACE_S, Role, Roles,
};
use super::key::{NodeKey, RootId};
use super::revocation::{REVOCATIONS_MAX, RevocationError, Revocations, SignedRevocation};
use super::signed::Signed;
use super::unix_time::{CLOCK_SKEW_S, UnixTime};

/// The authority chain and the revocations, checked. Whatever is in here was signed by the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trust {
    chain: AuthorityChain,
    revocations: Revocations,
}

impl Trust {
    /// The beginning of a mesh: `root` makes `founder` its authority.
    pub fn found(root: &NodeKey, founder: NodeId, now: UnixTime) -> Trust {
        let chain = AuthorityChain::found(root, founder, now);
        Trust { chain, revocations: Revocations::default() }
    }

    /// Checks what came from a peer. Events that no present authority signed are left out.
    ///
    /// # Errors
    /// If the chain does not hold, or an event is forged or of another mesh.
    pub fn verify(
        root: RootId,
        links: Vec<SignedSet>,
        events: Vec<SignedRevocation>,
        now: UnixTime,
    ) -> Result<Trust, TrustError> {
        let chain = AuthorityChain::verify(root, links)?;
        let mut trust = Trust { chain, revocations: Revocations::default() };
        trust.merge_revocations(events, now)?;
        Ok(trust)
    }

    /// As [`Trust::verify`], for what this node itself had taken in before: events stay even if their
    /// signer has lost its authority since.
    pub fn restore(
        root: RootId,
        links: Vec<SignedSet>,
        events: Vec<SignedRevocation>,
        now: UnixTime,
    ) -> Result<Trust, TrustError> {
        let chain = AuthorityChain::verify(root, links)?;
        let mut trust = Trust { chain, revocations: Revocations::default() };
        for event in events {
            let node = event.body.node;
            event.verify().map_err(|_| RevocationError::Forged { node })?;
            trust.revocations.insert(event, now)?;
        }
        Ok(trust)
    }

    pub fn mesh(&self) -> MeshId {
        self.chain.mesh()
    }

    pub fn root(&self) -> RootId {
        self.chain.root()
    }

    pub fn chain(&self) -> &AuthorityChain {
        &self.chain
    }

    pub fn revocations(&self) -> &Revocations {
        &self.revocations
    }

    /// The present authorities.
    pub fn authorities(&self) -> &[NodeId] {
        &self.chain.head().body.members
    }

    pub fn epoch(&self) -> u64 {
        self.chain.epoch()
    }

    pub fn head(&self) -> SetHash {
        self.chain.head().hash()
    }

    /// Whether `node` may issue at `now`.
    pub fn is_authority(&self, node: NodeId) -> bool {
        self.chain.contains(node) && !self.revocations.is_revoked(node)
    }

    /// Whether `certificate` makes `holder` a member at `now`. The caller knows by other means (TLS)
    /// that it talks to `holder`.
    ///
    /// # Errors
    /// The first reason found; [`CertificateError::EpochAhead`] goes away once this node has learned the
    /// newer authority sets.
    pub fn check(
        &self,
        certificate: &Certificate,
        holder: NodeId,
        now: UnixTime,
    ) -> Result<(), CertificateError> {
        certificate.body.check(self.mesh(), holder, now)?;
        self.check_origin(certificate)?;
        let head = &self.chain.head().body;
        if now > head.expires.plus(CLOCK_SKEW_S) {
            return Err(CertificateError::AuthorityExpired { ago_s: now.since(head.expires) });
        }
        Ok(())
    }

    /// As [`Trust::check`], for a certificate that is shown to get a new one: it may have expired up to
    /// [`RENEWAL_GRACE_S`] ago.
    pub fn check_renewal(
        &self,
        certificate: &Certificate,
        holder: NodeId,
        now: UnixTime,
    ) -> Result<(), CertificateError> {
        let body = &certificate.body;
        match body.check(self.mesh(), holder, now) {
            Err(CertificateError::Expired { ago_s }) if ago_s <= RENEWAL_GRACE_S => {}
            checked => checked?,
        }
        self.check_origin(certificate)
    }

    /// Whether an authority issued it, when it was one, and neither party is revoked.
    fn check_origin(&self, certificate: &Certificate) -> Result<(), CertificateError> {
        let Membership { node, epoch, not_before, .. } = certificate.body;
        let issuer = certificate.signer;
        if self.revocations.is_revoked(node) {
            return Err(CertificateError::Revoked { node });
        }
        if self.revocations.is_revoked(issuer) {
            return Err(CertificateError::IssuerRevoked { issuer });
        }
        if epoch > self.epoch() {
            return Err(CertificateError::EpochAhead { theirs: epoch, ours: self.epoch() });
        }
        // A present authority may have issued under a set that lost a fork, or that was cut off.
        if !self.chain.contains(issuer) {
            let set = self.chain.at(epoch).filter(|set| set.body.members.contains(&issuer));
            let removed = set.and_then(|_| self.chain.removed_at(issuer, epoch));
            // Whoever is no authority any more cannot go on issuing under its old epoch.
            let issued = not_before.plus(BACKDATE_S);
            if removed.is_none_or(|at| issued > at.plus(CLOCK_SKEW_S)) {
                return Err(CertificateError::NoAuthority { issuer, epoch });
            }
        }
        certificate.verify().map_err(|_| CertificateError::Forged)?;
        Ok(())
    }

    /// Makes `node` a member for a day. `serial` is random.
    ///
    /// # Errors
    /// If `key` is no authority, or `node` is revoked, or the authority has expired.
    pub fn issue(
        &self,
        key: &NodeKey,
        node: NodeId,
        roles: Roles,
        serial: u64,
        now: UnixTime,
    ) -> Result<Certificate, CertificateError> {
        let (issuer, epoch) = (key.id(), self.epoch());
        if !self.chain.contains(issuer) {
            return Err(CertificateError::NoAuthority { issuer, epoch });
        }
        let body = Membership {
            mesh: self.mesh(),
            node,
            roles,
            serial,
            not_before: now.minus(BACKDATE_S),
            expires: now.plus(LIFETIME_S),
            epoch,
        };
        let certificate = Signed::new(body, key);
        self.check(&certificate, node, now)?;
        Ok(certificate)
    }

    /// Checks `certificate` as [`Trust::check`] does, and that it grants `role`.
    pub fn check_role(
        &self,
        certificate: &Certificate,
        holder: NodeId,
        role: Role,
        now: UnixTime,
    ) -> Result<(), CertificateError> {
        self.check(certificate, holder, now)?;
        match certificate.body.roles.contains(role) {
            true => Ok(()),
            false => Err(CertificateError::Role { node: holder, role }),
        }
    }

    /// Takes over what another node knows of the authorities; says whether anything was new.
    pub fn merge_chain(&mut self, other: AuthorityChain) -> Result<bool, AuthorityError> {
        let revocations = &self.revocations;
        self.chain.merge(other, |signer| !revocations.is_revoked(signer))
    }

    /// Takes over events that are new here and signed by a present authority; says how many were.
    /// Others are left out and no fault of the peer's: it may have taken them in when their signer still
    /// had authority, and a present authority signs them anew ([`Trust::adopt_revocations`]).
    ///
    /// # Errors
    /// At the first event that is forged or of another mesh; those before it have been taken over.
    pub fn merge_revocations(
        &mut self,
        events: Vec<SignedRevocation>,
        now: UnixTime,
    ) -> Result<usize, RevocationError> {
        if events.len() > REVOCATIONS_MAX {
            return Err(RevocationError::TooMany { events: events.len() });
        }
        let mut news = 0;
        for event in events {
            let node = event.body.node;
            if event.body.mesh != self.mesh() {
                return Err(RevocationError::OtherMesh { theirs: event.body.mesh });
            }
            if !self.revocations.is_news(&event.body) {
                continue;
            }
            let signer = event.signer;
            let by_root = signer == self.root().signer();
            if !by_root && !self.is_authority(signer) {
                continue;
            }
            event.verify().map_err(|_| RevocationError::Forged { node })?;
            self.revocations.insert(event, now)?;
            news += 1;
        }
        Ok(news)
    }

    /// Changes who the authorities are; `key` is one of them, or the root.
    ///
    /// # Errors
    /// As [`AuthorityChain::append`], and if a new one is revoked. Nothing has changed then.
    pub fn change_authorities(
        &mut self,
        key: &NodeKey,
        members: Vec<NodeId>,
        now: UnixTime,
    ) -> Result<(), ChangeError> {
        if let Some(&node) = members.iter().find(|&&n| self.revocations.is_revoked(n)) {
            return Err(ChangeError::Revoked { node });
        }
        self.chain.append(key, members, now)?;
        self.adopt_revocations(key);
        Ok(())
    }

    /// Signs anew the events of those who are no authorities any more, if `key` is one.
    pub fn adopt_revocations(&mut self, key: &NodeKey) -> usize {
        if !self.is_authority(key.id()) {
            return 0;
        }
        let (chain, root) = (&self.chain, self.chain.root().signer());
        self.revocations.adopt(key, |signer| signer != root && !chain.contains(signer))
    }

    /// Ends (or, with `revoked` false, restores) the membership of `node`. An authority loses its
    /// authority first. `key` is an authority or the root.
    ///
    /// # Errors
    /// If `key` has no authority, `node` is the last authority, or too many nodes are revoked. An
    /// authority may have lost its authority even then.
    pub fn revoke(
        &mut self,
        key: &NodeKey,
        node: NodeId,
        revoked: bool,
        now: UnixTime,
    ) -> Result<SignedRevocation, ChangeError> {
        let by_root = key.root() == self.root();
        if !by_root && !self.is_authority(key.id()) {
            return Err(ChangeError::NoAuthority { node: key.id() });
        }
        if revoked && self.chain.contains(node) {
            let rest: Vec<_> = self.authorities().iter().copied().filter(|&n| n != node).collect();
            if rest.is_empty() {
                return Err(ChangeError::LastAuthority { node });
            }
            self.chain.append(key, rest, now)?;
            self.adopt_revocations(key);
        }
        let event = self.revocations.next(self.mesh(), node, revoked, now);
        let event = Signed::new(event, key);
        self.revocations.insert(event.clone(), now)?;
        Ok(event)
    }
}

/// Why a chain or its revocations are not to be believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Revocation(#[from] RevocationError),
}

/// Why authorities or revocations were not changed as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    #[error("{} is no authority of this mesh: ask one (`vine authority` lists them)", node.short())]
    NoAuthority { node: NodeId },
    #[error("{} is revoked and cannot be an authority", node.short())]
    Revoked { node: NodeId },
    #[error("{} is the last authority: make another node one first", node.short())]
    LastAuthority { node: NodeId },
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Revocation(#[from] RevocationError),
}

#[cfg(test)]
mod tests {
    use super::super::testing::{NOW, key, trust};
    use super::*;
    use crate::wire;

    const HOUR: u64 = 3600;

    fn certificate(trust: &Trust, node: u8, now: UnixTime) -> Certificate {
        trust.issue(&key(1), key(node).id(), Roles::ALL, 7, now).unwrap()
    }

    #[test]
    fn golden_certificate() {
        let certificate = certificate(&trust(&[1]), 5, NOW);
        let bytes = wire::encode(&certificate);
        assert_eq!(
            blake3::hash(&bytes).to_hex().as_str(),
            "af9dd8806e010227713eb9f7c9c92c7e66d5ab3394eb5d872b68463f16151382",
            "{}",
            super::super::testing::hex(&bytes)
        );
        assert_eq!(bytes.len(), 173);
    }

    #[test]
    fn each_reason_to_refuse() {
        type Change = fn(&mut Certificate);
        let trust = trust(&[1, 2]);
        let other = super::Trust::found(&key(8), key(1).id(), NOW).mesh();
        let (node, wrong) = (key(5).id(), key(6).id());
        let issuer = wrong;
        let cases: [(Change, CertificateError); 9] = [
            (
                |c| c.body.mesh = RootId(key(8).id().0).mesh(),
                CertificateError::OtherMesh { theirs: other },
            ),
            (
                |c| c.body.node = key(6).id(),
                CertificateError::OtherNode { named: wrong, holder: node },
            ),
            (|c| c.body.expires.0 += 1, CertificateError::Lifetime),
            (|c| c.body.expires.0 -= 1, CertificateError::Forged),
            (|c| c.body.not_before.0 += 1, CertificateError::Forged),
            (|c| c.body.roles = Roles::new(&[]), CertificateError::Forged),
            (|c| c.body.serial ^= 1, CertificateError::Forged),
            (|c| c.signer = key(6).id(), CertificateError::NoAuthority { issuer, epoch: 2 }),
            (|c| c.body.epoch = 9, CertificateError::EpochAhead { theirs: 9, ours: 2 }),
        ];
        for (change, error) in cases {
            let mut certificate = certificate(&trust, 5, NOW);
            assert_eq!(trust.check(&certificate, node, NOW), Ok(()));
            change(&mut certificate);
            assert_eq!(trust.check(&certificate, node, NOW), Err(error));
        }
        // Signed by an authority's name, but with another key.
        let mut forged = certificate(&trust, 5, NOW);
        forged.signature = Signed::new(forged.body.clone(), &key(6)).signature;
        assert_eq!(trust.check(&forged, node, NOW), Err(CertificateError::Forged));
    }

    #[test]
    fn clocks() {
        let trust = trust(&[1]);
        let node = key(5).id();
        let certificate = certificate(&trust, 5, NOW);
        let check = |now| trust.check(&certificate, node, now);
        let end = NOW.plus(LIFETIME_S);
        for (now, ok) in [
            (NOW, true),
            // A host whose clock was set back by an hour, and a little more.
            (NOW.minus(HOUR), true),
            (NOW.minus(HOUR + CLOCK_SKEW_S), true),
            (NOW.minus(HOUR + CLOCK_SKEW_S + 1), false),
            (end, true),
            (end.plus(CLOCK_SKEW_S), true),
            (end.plus(CLOCK_SKEW_S + 1), false),
            (UnixTime(0), false),
            (UnixTime(u64::MAX), false),
        ] {
            assert_eq!(check(now).is_ok(), ok, "{now}");
        }
        assert_eq!(
            check(NOW.minus(2 * HOUR)),
            Err(CertificateError::NotYetValid { ahead_s: HOUR })
        );
        assert_eq!(check(end.plus(400)), Err(CertificateError::Expired { ago_s: 400 }));
        let late = |now| trust.check_renewal(&certificate, node, now).is_ok();
        assert!(late(end.plus(RENEWAL_GRACE_S)) && !late(end.plus(RENEWAL_GRACE_S + 1)));

        let body = &certificate.body;
        assert_eq!(body.renew_at(), NOW.plus(16 * HOUR));
        for (now, due) in [(NOW, false), (NOW.plus(16 * HOUR), true), (NOW.minus(2 * HOUR), true)] {
            assert_eq!(body.is_due(now), due, "{now}");
        }
    }

    #[test]
    fn an_expired_authority_issues_nothing() {
        let trust = trust(&[1]);
        let late = NOW.plus(super::super::AUTHORITY_LIFETIME_S + CLOCK_SKEW_S + 1);
        assert_eq!(
            trust.issue(&key(1), key(5).id(), Roles::ALL, 1, late),
            Err(CertificateError::AuthorityExpired { ago_s: CLOCK_SKEW_S + 1 })
        );
        assert!(trust.chain().is_due(late) && !trust.chain().is_due(NOW));
    }

    #[test]
    fn roles_are_granted_by_the_certificate() {
        let trust = trust(&[1]);
        let node = key(5).id();
        let roles = Roles::new(&[Role::Compute]);
        let certificate = trust.issue(&key(1), node, roles, 1, NOW).unwrap();
        assert_eq!(trust.check_role(&certificate, node, Role::Compute, NOW), Ok(()));
        assert_eq!(
            trust.check_role(&certificate, node, Role::Ingress, NOW),
            Err(CertificateError::Role { node, role: Role::Ingress })
        );
    }

    #[test]
    fn a_revoked_node_is_out_and_can_come_back() {
        let mut trust = trust(&[1, 2]);
        let node = key(5).id();
        let certificate = certificate(&trust, 5, NOW);
        let out = trust.revoke(&key(2), node, true, NOW).unwrap();
        assert_eq!(trust.check(&certificate, node, NOW), Err(CertificateError::Revoked { node }));
        assert_eq!(
            trust.check_renewal(&certificate, node, NOW),
            Err(CertificateError::Revoked { node })
        );
        assert!(trust.issue(&key(1), node, Roles::ALL, 1, NOW).is_err());
        let again = trust.revoke(&key(1), node, false, NOW).unwrap();
        assert_eq!((out.body.epoch, again.body.epoch), (1, 2));
        assert_eq!(trust.check(&certificate, node, NOW), Ok(()));
        // Whatever the order in which another node hears of it.
        for events in [vec![out.clone(), again.clone()], vec![again, out]] {
            let mut other = super::super::testing::trust(&[1, 2]);
            other.merge_revocations(events, NOW).unwrap();
            assert_eq!(other.revocations().digest(), trust.revocations().digest());
        }
        let refused = trust.revoke(&key(5), key(1).id(), true, NOW);
        assert_eq!(refused, Err(ChangeError::NoAuthority { node }));
    }

    #[test]
    fn revoking_an_authority_ends_what_it_issued() {
        let mut trust = trust(&[1, 2, 3]);
        let node = key(5).id();
        let certificate = trust.issue(&key(3), node, Roles::ALL, 1, NOW).unwrap();
        trust.revoke(&key(1), key(3).id(), true, NOW).unwrap();
        let issuer = key(3).id();
        assert_eq!(
            trust.check(&certificate, node, NOW),
            Err(CertificateError::IssuerRevoked { issuer })
        );
        assert_eq!((trust.epoch(), trust.authorities().len()), (3, 2));
        trust.revoke(&key(1), key(2).id(), true, NOW).unwrap();
        let last = trust.revoke(&key(1), key(1).id(), true, NOW);
        assert_eq!(last, Err(ChangeError::LastAuthority { node: key(1).id() }));
        assert_eq!(
            trust.change_authorities(&key(1), vec![key(2).id()], NOW),
            Err(ChangeError::Revoked { node: key(2).id() })
        );
    }

    /// An authority that is merely gone: what it issued lives out its day and can be renewed, but its
    /// key issues nothing new, not even under its old epoch.
    #[test]
    fn losing_an_authority_keeps_its_members() {
        let mut trust = trust(&[1, 2]);
        let node = key(5).id();
        let before = trust.clone();
        let certificate = trust.issue(&key(1), node, Roles::ALL, 1, NOW).unwrap();
        trust.revoke(&key(1), key(9).id(), true, NOW).unwrap();
        let later = NOW.plus(HOUR);
        trust.change_authorities(&key(2), vec![key(2).id()], later).unwrap();
        assert_eq!(trust.check(&certificate, node, later), Ok(()));
        let stolen = before.issue(&key(1), node, Roles::ALL, 1, later.plus(HOUR)).unwrap();
        assert_eq!(
            trust.check(&stolen, node, later.plus(HOUR)),
            Err(CertificateError::NoAuthority { issuer: key(1).id(), epoch: 2 })
        );
        // A newcomer knows only the present authorities and still hears of the revocation.
        let events: Vec<_> = trust.revocations().iter().cloned().collect();
        let links = trust.chain().links().to_vec();
        let newcomer = Trust::verify(trust.root(), links, events, later).unwrap();
        assert!(newcomer.revocations().is_revoked(key(9).id()));
    }

    #[test]
    fn forged_revocations() {
        type Change = fn(&mut SignedRevocation);
        let mut source = trust(&[1]);
        let node = key(5).id();
        let event = source.revoke(&key(1), node, true, NOW).unwrap();
        let theirs = RootId(key(8).id().0).mesh();
        let cases: [(Change, Result<usize, RevocationError>); 4] = [
            (|e| e.signature.0[0] ^= 1, Err(RevocationError::Forged { node })),
            (|e| e.body.epoch = 9, Err(RevocationError::Forged { node })),
            (|e| e.signer = key(6).id(), Ok(0)),
            (
                |e| e.body.mesh = RootId(key(8).id().0).mesh(),
                Err(RevocationError::OtherMesh { theirs }),
            ),
        ];
        for (change, result) in cases {
            let mut event = event.clone();
            change(&mut event);
            let mut trust = trust(&[1]);
            assert_eq!(trust.merge_revocations(vec![event], NOW), result);
            assert!(trust.revocations().is_empty());
        }
        let many = vec![event; REVOCATIONS_MAX + 1];
        assert!(matches!(
            trust(&[1]).merge_revocations(many, NOW),
            Err(RevocationError::TooMany { .. })
        ));
    }

    #[test]
    fn revocations_are_bounded_and_the_old_make_room() {
        let mut trust = trust(&[1]);
        let node = |n: usize| {
            let mut id = [3; 32];
            id[..8].copy_from_slice(&(n as u64).to_le_bytes());
            NodeId(id)
        };
        for n in 0..REVOCATIONS_MAX {
            trust.revoke(&key(1), node(n), true, NOW).unwrap();
        }
        let one_more = trust.revoke(&key(1), node(REVOCATIONS_MAX), true, NOW);
        assert_eq!(one_more, Err(ChangeError::Revocation(RevocationError::Full)));
        let later = NOW.plus(super::super::REVOCATION_KEEP_S + 1);
        trust.revoke(&key(1), node(REVOCATIONS_MAX), true, later).unwrap();
        assert_eq!(trust.revocations().len(), 1);
    }
}
