//! Where quotas must not be trusted, nobody is refused: each cause has its own reason.

use std::thread;
use std::time::Duration;

use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::wire::Wire;
use testkit::fixtures::{Balancer, Machine, Signal, remains};

use crate::support::{agents, agree, open_listeners, own_port, virtual_port};

/// Longer than a SYN-ACK waits before it is sent again: from then on a half-open connection is not
/// expected to complete.
const NO_LONGER_YOUNG: Duration = Duration::from_millis(1_300);
/// Long enough for several comparisons with the socket table.
const SEVERAL_PASSES: Duration = Duration::from_secs(4);

/// The smallest computed quota is 16. Clients that take seconds over their handshakes are not seen
/// coming.
#[test]
fn computed_quotas_far_below_what_stands_refuse_nobody() {
    Machine::with(|machine| {
        let yaml = virtual_port("least-connections", 2, &["quota: {clients: 4}"]);
        let balancer = Balancer::start(machine, &format!("{yaml}fail_open_after: 5m\n"));
        let mut listeners = open_listeners(2);
        balancer.wait_until(|service| {
            service
                .backends
                .iter()
                .all(|backend| backend.quota == Some(16))
                && service.active() == 2
        });
        // A daemon that is stuck: otherwise it would raise the quotas within a second.
        balancer.signal(Signal::SIGSTOP);
        let wire = Wire::open(&machine.netns);
        let mut opened = Vec::new();
        for batch in 0..4 {
            let (answers, _) = wire.half_open(batch * 32..(batch + 1) * 32, agents());
            opened.extend(answers.into_values());
            thread::sleep(NO_LONGER_YOUNG);
        }
        assert!(opened.len() > 60, "only {} half-open", opened.len());
        wire.ack_all(&opened);
        let standing: usize = agree(&balancer, &mut listeners).iter().sum();
        assert!(standing > 48, "{standing} established");
        let mut late = tcp::connect_many(agents(), 5);
        assert_eq!(late.len(), 5);
        let service = balancer.service();
        assert_eq!(service.verdicts("fail-open-quota"), 5, "{service:?}");
        let explained = balancer.explain(&"127.0.0.1", &11_800);
        assert_eq!(explained.reason.as_deref(), Some("fail-open-quota"));
        // The daemon raises the quotas to what stands, and from then on they are believed again.
        balancer.signal(Signal::SIGCONT);
        balancer.wait_until(|service| {
            let quotas = service.backends.iter().filter_map(|backend| backend.quota);
            quotas.sum::<u32>() as usize >= standing + late.len()
        });
        balancer.eventually(|_| {
            // Rounding may leave room for a few.
            let refused = tcp::connect(agents())
                .ok()
                .map(|client| late.push(client))
                .is_none();
            anyhow::ensure!(refused, "let in");
            Ok(())
        });
        agree(&balancer, &mut listeners);
    });
}

/// What somebody wrote down is meant so, however many stand.
#[test]
fn a_fixed_quota_below_what_stands_refuses() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let mut listeners = vec![Listen::on(&agents()).open()];
        let _clients = tcp::connect_many(agents(), 100);
        balancer.quota_set("agents", None, 10);
        assert!(tcp::connect(agents()).is_refused());
        assert_eq!(balancer.service().verdicts("over-quota"), 1);
        assert_eq!(agree(&balancer, &mut listeners), [100]);
    });
}

/// A service has 256 backends at the most; the 257th listener serves without the balancer, and may
/// have room.
#[test]
fn listeners_without_a_slot_open_the_service() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 1}"]);
        let balancer = Balancer::start(machine, &yaml);
        let open = |number: usize| -> Vec<_> {
            (0..number)
                .map(|_| Listen::on(&agents()).reuse_port().open())
                .collect()
        };
        let mut listeners = open(256);
        let clients = tcp::connect_many(agents(), 256);
        assert_eq!(clients.len(), 256);
        assert!(tcp::connect(agents()).is_refused());
        let homeless = open(1);
        let more = tcp::connect_many(agents(), 20);
        assert_eq!(more.len(), 20, "{:?}", balancer.service().verdicts);
        assert_eq!(balancer.service().verdicts("fail-open-full"), 20);
        balancer.wait_for_log("no slot is free", 0);
        remains(SEVERAL_PASSES, || {
            anyhow::ensure!(!tcp::connect(agents()).is_refused(), "refused");
            Ok(())
        });
        // Gone, or with a slot that has become free, it is no reason any more.
        drop(homeless);
        balancer.eventually(|_| {
            anyhow::ensure!(tcp::connect(agents()).is_refused(), "let in");
            Ok(())
        });
        let homeless = open(1);
        assert!(!tcp::connect(agents()).is_refused());
        drop((clients, more));
        drop(listeners.pop());
        balancer.eventually(|service| {
            anyhow::ensure!(service.active() == 256, "{} active", service.active());
            Ok(())
        });
        drop(homeless);
    });
}
