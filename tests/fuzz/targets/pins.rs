//! The reader of the pinned maps: whatever they hold, `status` makes sense of it, in text and in
//! JSON.
//!
//! An input is a service, a heartbeat and the result of a comparison, then slots, each as it stands
//! in the maps (native byte order). What is missing at the end is zero.
#![no_main]

use std::collections::BTreeMap;

use balancer::dataplane::{MapContents, PlacingContents, ServiceContents, Snapshot};
use balancer::fuzzing::{status_json, status_text};
use balancer_common::Reason;
use balancer_common::abi::{
    Address, AuditTotals, Backend, Counts, Health, Heartbeat, KeepaliveWord, ServiceInfo, Silence,
    SlotMoves, SlotPolicy,
};
use balancer_common::decision::member::Member;
use bytes::Buf;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let image = image(input);
    let snapshot = Snapshot::of(&image);
    let services = &snapshot.services;
    assert_eq!(services.len(), image.services.len());
    let of_services = |member: &&Member| {
        let mut ids = image.services.iter().map(|service| service.id);
        ids.any(|id| id == member.backend.service)
    };
    let shown: usize = services.iter().map(|service| service.backends.len()).sum();
    assert_eq!(shown, image.slots.iter().filter(of_services).count());
    assert!(status_text(&snapshot).starts_with("Daemon: "));
    let json = status_json(&snapshot).expect("it can be written");
    let value: serde_json::Value = serde_json::from_str(&json).expect("it is JSON");
    assert_eq!(value["schema"], 1);
    let listed = value["services"].as_array().expect("a list");
    assert_eq!(listed.len(), services.len());
});

/// Bytes of the input, zeros behind its end.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let length = N.min(self.0.remaining());
        self.0.copy_to_slice(&mut bytes[..length]);
        bytes
    }

    fn u8(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    fn u16(&mut self) -> u16 {
        u16::from_ne_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }

    fn address(&mut self) -> Address {
        Address(std::array::from_fn(|_| self.u32()))
    }
}

fn image(input: &[u8]) -> MapContents {
    let mut bytes = Bytes(input);
    let services = (0..bytes.u8() % 4).map(|_| service(&mut bytes)).collect();
    let heartbeat = Heartbeat {
        last_ns: bytes.u64(),
        limit_ns: bytes.u64(),
    };
    let audit_totals = AuditTotals {
        checks: bytes.u64(),
        drift: bytes.u64(),
        repairs: bytes.u64(),
        last_ns: bytes.u64(),
        cost_ns: bytes.u64(),
    };
    let now_ns = bytes.u64();
    let (mut slots, mut silences) = (Vec::new(), BTreeMap::new());
    let mut moves = BTreeMap::new();
    while bytes.0.has_remaining() {
        let member = member(&mut bytes);
        let packed = bytes.u64();
        silences.insert(member.slot, Silence { packed });
        let [generation, left, others] = [(); 3].map(|()| bytes.u64());
        let of_slot = SlotMoves {
            generation,
            left,
            others,
        };
        moves.insert(member.slot, of_slot);
        slots.push(member);
    }
    MapContents {
        services,
        slots,
        listed: BTreeMap::new(),
        down: Vec::new(),
        silences,
        moves,
        heartbeat,
        audit_totals,
        placing: PlacingContents::default(),
        now_ns,
    }
}

fn service(bytes: &mut Bytes<'_>) -> ServiceContents {
    let id = bytes.u16();
    let info = ServiceInfo {
        name: bytes.take(),
        rule: bytes.take(),
        sentence: bytes.take(),
        address: bytes.address(),
        quota_by_hand: bytes.u32(),
        by_hand: bytes.u32(),
        port: bytes.u16(),
        policy: bytes.u8(),
        flags: bytes.u8(),
        quota: bytes.u32(),
        unattributed: bytes.u32(),
    };
    let verdicts = Reason::ALL
        .iter()
        .map(|reason| (*reason, bytes.u64()))
        .collect();
    ServiceContents {
        id,
        info,
        keepalive: KeepaliveWord {
            packed: bytes.u64(),
        },
        verdicts,
    }
}

fn member(bytes: &mut Bytes<'_>) -> Member {
    Member {
        slot: bytes.u32(),
        backend: Backend {
            slot_state: bytes.u64(),
            netns: bytes.u64(),
            address: bytes.address(),
            port: bytes.u16(),
            service: bytes.u16(),
            weight: bytes.u32(),
            uid: bytes.u32(),
            device: bytes.u32(),
            flags: bytes.u32(),
            map_error: bytes.u32(),
            pid: bytes.u32(),
            tid: bytes.u32(),
            cgroup: bytes.u64(),
        },
        policy: SlotPolicy {
            quota: bytes.u64(),
            weight: bytes.u64(),
            adopted: bytes.u64(),
            server: bytes.u64(),
        },
        counts: Counts {
            established: bytes.u64(),
            expected: bytes.u64(),
            full: bytes.u64(),
            cookies: bytes.u64(),
            flood: bytes.u64(),
            handshake: bytes.u64(),
        },
        health: Health {
            queue: bytes.u64(),
            stalled: bytes.u64(),
            failures: bytes.u64(),
            failing: bytes.u64(),
            failing_since: bytes.u64(),
            hung: bytes.u64(),
            hung_since: bytes.u64(),
            zero: bytes.u64(),
        },
    }
}
