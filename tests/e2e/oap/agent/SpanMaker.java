package balancer.e2e;

import org.apache.skywalking.apm.agent.core.boot.BootService;
import org.apache.skywalking.apm.agent.core.boot.DefaultImplementor;
import org.apache.skywalking.apm.agent.core.boot.ServiceManager;
import org.apache.skywalking.apm.agent.core.conf.Config;
import org.apache.skywalking.apm.agent.core.context.ContextCarrier;
import org.apache.skywalking.apm.agent.core.context.ContextManager;
import org.apache.skywalking.apm.agent.core.remote.GRPCChannelListener;
import org.apache.skywalking.apm.agent.core.remote.GRPCChannelManager;
import org.apache.skywalking.apm.agent.core.remote.GRPCChannelStatus;

/**
 * A boot service of the SkyWalking agent that makes a one-span segment every PERIOD_MS, named SERVICE-N.
 *
 * <p>Each is an endpoint of its own, so that the OAPs have metrics that they must send to each other. The first one is made
 * when the agent has a channel: the agent itself drops those made earlier.
 */
@DefaultImplementor
public final class SpanMaker implements BootService, GRPCChannelListener, Runnable {
    private static final long PERIOD_MS = 100;

    private boolean started;

    @Override
    public void prepare() {
        ServiceManager.INSTANCE.findService(GRPCChannelManager.class).addChannelListener(this);
    }

    @Override
    public void boot() { }

    @Override
    public void onComplete() { }

    @Override
    public void shutdown() { }

    @Override
    public synchronized void statusChanged(GRPCChannelStatus status) {
        if (status == GRPCChannelStatus.CONNECTED && !started) {
            started = true;
            Thread thread = new Thread(this, "span-maker");
            thread.setDaemon(true);
            thread.start();
        }
    }

    @Override
    public void run() {
        try {
            for (int number = 0; ; number++) {
                Thread.sleep(PERIOD_MS);
                ContextManager.createEntrySpan(Config.Agent.SERVICE_NAME + "-" + number, new ContextCarrier());
                ContextManager.stopSpan();
                System.out.println("made " + number);
            }
        } catch (InterruptedException end) {
            Thread.currentThread().interrupt();
        }
    }
}
