//! Names of blocks against vectors that the reference implementation of BLAKE3 gave (its Python
//! binding), and what must change them.

use cache::{BlockHash, HashChain, IdentityParts, NumericalIdentity, TenantSalt};
use protocol::{TenantId, TokenId};

const WEIGHTS: [u8; 32] = {
    let mut bytes = [0; 32];
    let mut i = 0;
    while i < 32 {
        bytes[i] = i as u8;
        i += 1;
    }
    bytes
};

fn parts() -> IdentityParts<'static> {
    IdentityParts {
        weights: &WEIGHTS,
        architecture: "llama layers=2 heads=4/2 dim=64",
        kv_dtype: "f16",
        rope: "base=10000",
        adapter: "",
    }
}

fn chain(tenant: &str, parts: &IdentityParts<'_>, tokens: &[TokenId]) -> HashChain {
    let tenant = TenantId::new(tenant).expect("a valid name");
    let salt = TenantSalt::derive(&[7; 32], &tenant);
    let mut chain = HashChain::new(salt, &NumericalIdentity::new(parts), 16);
    chain.extend(tokens);
    chain
}

fn two_blocks() -> Vec<TokenId> {
    (100..116).chain([TokenId::MAX; 16]).collect()
}

#[test]
fn names_are_those_of_the_vectors() {
    let identity = NumericalIdentity::new(&parts());
    let hex: String = identity.as_bytes().iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, "0bfad31d4c2760116dd5976eacd3bdca851e5c417822599870c1fbe73380490b");
    for (tenant, expected) in [
        (
            "local",
            [
                "d5dde44aeb40802ba41ff750bcc5154392e714f517adacd93df1e0394298a7ea",
                "98764202985e06039b52f983322e078ab13d7f3d8daa30f2649b6c5cb6cee607",
                "7ca6c4dc1f90ce5204269dad6f4f5e7fb0e204c15123d8d25669e5c7100c2374",
            ],
        ),
        (
            "acme",
            [
                "d0a171efc3a2457b4f87932987c91a417f4d1061ce82312c673c22a6c153eda8",
                "1c4932c9add427b1d644d8b4a64054d700fd7feaf14fa1d524797c85cecb060d",
                "5daa37b65da54c89acd07cf9d64848fa2082adba6f8e14251143add1b5930224",
            ],
        ),
    ] {
        let chain = chain(tenant, &parts(), &two_blocks());
        let names: Vec<String> =
            [chain.root()].iter().chain(chain.hashes()).map(BlockHash::to_string).collect();
        assert_eq!(names, expected, "{tenant}");
    }
}

#[test]
fn only_full_blocks_have_names_and_growth_changes_none() {
    let tokens: Vec<TokenId> = (0..200).collect();
    let whole = chain("a", &parts(), &tokens);
    assert_eq!(whole.hashes().len(), 12);
    let mut grown = chain("a", &parts(), &[]);
    for end in 0..=tokens.len() {
        grown.extend(&tokens[..end]);
        assert_eq!(grown.hashes(), &whole.hashes()[..end / 16]);
    }
}

#[test]
fn every_part_of_the_identity_and_the_secret_counts() {
    let base = chain("a", &parts(), &two_blocks());
    let others = [
        IdentityParts { weights: &[1], ..parts() },
        IdentityParts { architecture: "llama layers=3 heads=4/2 dim=64", ..parts() },
        IdentityParts { kv_dtype: "f32", ..parts() },
        IdentityParts { rope: "base=500000", ..parts() },
        IdentityParts { adapter: "x", ..parts() },
        // The same bytes, cut elsewhere.
        IdentityParts { kv_dtype: "f16base", rope: "=10000", ..parts() },
    ];
    for other in &others {
        assert_ne!(chain("a", other, &two_blocks()).hashes(), base.hashes(), "{other:?}");
    }
    let tenant = TenantId::local();
    assert_ne!(TenantSalt::derive(&[7; 32], &tenant), TenantSalt::derive(&[8; 32], &tenant));
    assert_eq!(format!("{:?}", TenantSalt::derive(&[7; 32], &tenant)), "TenantSalt(..)");
}

#[test]
fn a_name_stands_for_all_before_it() {
    let base = chain("a", &parts(), &two_blocks());
    let mut changed = two_blocks();
    changed[0] += 1;
    let changed = chain("a", &parts(), &changed);
    assert!(base.hashes().iter().zip(changed.hashes()).all(|(a, b)| a != b));
}
