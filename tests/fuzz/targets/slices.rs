//! An `EndpointSlice` of anybody: whatever it says, the OAP's own port stays in the plan, only its
//! own pods are exempt there, and everything fits into the kernel's tables.
#![no_main]

use balancer::fuzzing::{OAP, plan_beside_slice};
use libfuzzer_sys::fuzz_target;

/// The target port of the OAP.
const PORT: u16 = 11800;
/// A port for the OAP, and as many as the Services of another namespace may have.
const MOST_PORTS: usize = 1 + 8;
/// What the kernel half's table of exempt sources takes.
const MOST_EXEMPT: usize = 16_384;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    let Ok(plan) = plan_beside_slice(text) else {
        return;
    };
    assert!(plan.services.len() <= MOST_PORTS, "{plan:?}");
    let ids: Vec<u16> = (0..).take(plan.services.len()).collect();
    assert!(plan.exempt(&ids).len() <= MOST_EXEMPT);
    let oap = plan.services.iter().find(|service| service.port == PORT);
    let exempt = &oap.expect("its port stays").exempt;
    // Where another namespace claims the pod, too, nobody is refused there.
    let is_contested = !exempt.iter().any(|network| network.addr() == OAP);
    if !is_contested && !of_its_own_namespace(text) {
        let strangers = exempt
            .iter()
            .filter(|network| !network.addr().is_loopback() && network.addr() != OAP);
        assert_eq!(strangers.count(), 0, "{exempt:?}");
    }
});

/// Whoever writes in the OAP's namespace may say which pods are its own.
fn of_its_own_namespace(text: &str) -> bool {
    let slice: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
    slice["metadata"]["namespace"] == "sw"
}
